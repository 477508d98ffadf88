"""The local back end: all nodes of a run as processes of this machine, watched until they end."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import FrameType

from rich.console import Console

from alignkd.errors import EXIT_SAVED_ON_USR1, UserError
from alignkd.run_folder.atomic_files import read_json
from alignkd.run_folder.paths import RunPaths
from launcher.backends.devices import visible_gpus
from launcher.backends.ranks import RankGroup, free_port, rank_environments, start_ranks
from launcher.backends.slurm.lifecycle import Evidence, Reason, decide
from launcher.run import attempts
from launcher.run.exit_codes import (
    ATTEMPT_PREFIX,
    ended_by,
    exit_code,
    failed_rank,
    failure_report,
    is_failure,
)
from launcher.run.logs import log_of_failure
from launcher.run.manifest import Manifest
from launcher.run.progress import GONE, LastingView, Pace, Snapshot, View, make_view, read_snapshot

POLL_SECONDS = 0.25
FAILURE_GRACE_SECONDS = 10.0  # the others cannot save without the dead rank
STOP_GRACE_SECONDS = 120.0  # ranks leave together after a save; one that stays behind hangs


def rank_command(run: Path) -> list[str]:
    return [sys.executable, "-m", "alignkd.train", str(run)]


def choose_device(ranks: int, gpus: Sequence[str]) -> str:
    """ "auto" (a GPU per rank) or "cpu"."""
    return "auto" if len(gpus) >= ranks else "cpu"


def gpu_problem(run: Path, manifest: Manifest, gpus: Sequence[str]) -> str | None:
    """Why these GPUs cannot run it; None when they can, or when it runs on the CPU."""
    if manifest.device == "cpu" or len(gpus) >= manifest.world_size:
        return None
    return (
        f"{run} takes {manifest.world_size} GPUs and this machine has {len(gpus)}; continue where they are, "
        "or with fewer --nodes"
    )


def run_local(run: Path, manifest: Manifest, console: Console, command: Sequence[str] | None = None) -> int:
    """Start the ranks of ``run``, show their progress until all have ended, return the exit code.

    ``command`` starts one rank (default: ``alignkd.train``).
    """
    gpus = visible_gpus(os.environ)
    problem = gpu_problem(run, manifest, gpus)
    if problem:
        raise UserError(problem)

    def start() -> RankGroup:
        environments = rank_environments(
            manifest.nodes, manifest.gpus_per_node, free_port(), manifest.device, gpus, os.environ
        )
        started = attempts.begin(run, "local", platform.node(), None)
        words = command or rank_command(run)
        when = datetime.now().astimezone().isoformat(timespec="seconds")
        shown = shlex.join(words).replace("\n", " ")
        heading = f"{ATTEMPT_PREFIX}{started.number}: {when}, on {platform.node()}: {shown}"
        return start_ranks(words, environments, RunPaths(run).logs, heading)

    return watch_ranks(run, start, console)


def watch_ranks(
    run: Path,
    start: Callable[[], RankGroup],
    console: Console,
) -> int:
    """Show the progress of the ranks that ``start`` starts until all have ended; returns the exit code.

    ``start`` opens an attempt of the run, which is closed here. Signals to this process go to the ranks, and
    all of them end when one fails. The caller holds the run's lock.
    """
    with _Stops() as stops:
        started = time.time()
        group = start()
        view = LastingView(lambda: make_view(console))
        try:
            _watch(group, run, started, view, stops)
        finally:
            group.kill()
            view.close()
        try:
            _close_attempt(run, group, stopped=bool(stops.received))
        except OSError as error:  # the ranks have ended as they have, whether or not it can be written down
            print(f"{RunPaths(run).attempts}: {error.strerror}", file=sys.stderr)
    with contextlib.suppress(*GONE):  # the exit code may still count
        _conclude(group, run, console, stopped=bool(stops.received))
    return exit_code(group.codes)


def _close_attempt(run: Path, group: RankGroup, stopped: bool) -> None:
    attempt = attempts.open_attempt(run)
    if attempt is None:  # without locks another launcher may have come in between, and has closed it
        return
    # rank.sh of the ssh back end writes the codes down: those of ssh itself say less.
    codes = attempts.exit_codes(run) or group.codes
    code, rank = exit_code(codes), failed_rank(codes)
    evidence = Evidence(
        codes=codes,
        srun_status=exit_code(group.codes),
        result=(read_json(RunPaths(run).result) or {}).get("status"),
        progressed=attempts.newest_step(run) > attempt.first_step,
        stop_requested=code == EXIT_SAVED_ON_USR1,  # nothing else sends USR1 here
        fruitless_before=0,
        max_restarts=0,
    )
    cut_short = stopped and rank is not None and _is_of_a_stop(codes[rank])
    attempts.close(run, attempt, Reason.TERMINATED if cut_short else decide(evidence).reason, codes=codes)


def _is_of_a_stop(code: int) -> bool:
    """Did a signal of a stop end a rank, which had no time to save?"""
    return ended_by(code) in (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL)


@dataclass
class _Stops:
    """Signals to the launcher, kept for the watching loop. The handlers only take notes."""

    received: list[int] = field(default_factory=list)
    _before: dict[int, object] = field(default_factory=dict)

    def __enter__(self) -> _Stops:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received.append(number)


def _watch(group: RankGroup, run: Path, started: float, view: View, stops: _Stops) -> None:
    pace, seen, deadline = Pace(), 0, None
    view.show(Snapshot(), None)
    while group.running:
        ended = group.next_exit(POLL_SECONDS)
        if (now := read_snapshot(RunPaths(run).progress, started)) is not None:
            view.show(now, pace.seconds_left(now))
        _read_stop_file(run, stops)
        for number in stops.received[seen:]:
            _forward(group, number, first=seen == 0, view=view)
            seen += 1
        if ended is None:
            pass
        elif is_failure(ended.code):
            if group.running:
                view.note(f"rank {ended.rank} failed; ending the others")
                group.stop(FAILURE_GRACE_SECONDS)
        elif ended.code != 0:
            deadline = deadline or time.monotonic() + STOP_GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            view.note("a rank did not end after the save; ending it")
            group.stop(FAILURE_GRACE_SECONDS)


def _read_stop_file(run: Path, stops: _Stops) -> None:
    """`alignkd stop` and `alignkd cancel` come from another terminal."""
    path = RunPaths(run).stop
    if path.exists():
        planned = path.read_text(encoding="utf-8").startswith("USR1")
        stops.received.append(signal.SIGUSR1 if planned else signal.SIGTERM)
        path.unlink(missing_ok=True)


def _forward(group: RankGroup, number: int, first: bool, view: View) -> None:
    if first:
        planned = number == signal.SIGUSR1
        group.signal(signal.SIGUSR1 if planned else signal.SIGTERM)
        view.note("stopping: the ranks save first (a second Ctrl-C ends them at once)")
    elif number == signal.SIGUSR1:
        pass  # a stop is under way
    else:
        view.note("ending the ranks at once")
        group.kill()


def _conclude(group: RankGroup, run: Path, console: Console, stopped: bool) -> None:
    rank = failed_rank(group.codes)
    if rank is None:
        if exit_code(group.codes) != 0:
            console.print(
                f"stopped and saved; go on with: alignkd resume {shlex.quote(str(run))}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    elif stopped and _is_of_a_stop(group.codes[rank]):
        print(f"{run}: ended before the ranks could save; what was saved before is there", file=sys.stderr)
    else:
        print(failure_report(rank, group.codes[rank], log_of_failure(run, rank)), file=sys.stderr)
