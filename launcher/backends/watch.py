"""Watch the ranks of a run until all have ended: for back ends whose launcher stays while the run trains."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from alignkd.errors import EXIT_HUNG, EXIT_SAVED_ON_USR1
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.progress import Snapshot, read_snapshot
from alignkd.run_folder.result import result_status
from launcher.backends.hang_end import record_hang
from launcher.backends.ranks import RankGroup
from launcher.backends.slurm.lifecycle import Evidence, decide
from launcher.run import attempts
from launcher.run.attempts import Reason
from launcher.run.console import say
from launcher.run.exit_codes import ended_by, exit_code, failed_rank, failure_report, is_failure
from launcher.run.hangs import Hang, HangWatch, hang_codes
from launcher.run.logs import log_of_failure
from launcher.run.progress_view import GONE, LastingView, Pace, View, make_view

if TYPE_CHECKING:
    from rich.console import Console

POLL_SECONDS = 0.25
FAILURE_GRACE_SECONDS = 10.0  # the other ranks cannot save without the dead one
STOP_GRACE_SECONDS = 120.0  # ranks exit together after a save; one that stays behind hangs


def watch_ranks(run: Path, start: Callable[[], RankGroup], console: Console) -> int:
    """Show the progress of the ranks that ``start`` starts until all have ended; returns the exit code.

    ``start`` opens an attempt of the run, which is closed here. Signals to this process are passed on to the
    ranks, and when one rank fails the others are ended. The caller holds the run's lock.
    """
    with _Stops() as stops:
        started = time.time()
        group = start()
        view = LastingView(lambda: make_view(console))
        try:
            hang = _watch(group, run, started, view, stops)
        finally:
            group.kill()
            view.close()
        try:
            _close_attempt(run, group, stopped=bool(stops.received), hang=hang)
        except OSError as error:  # the ranks have ended as they have, whether or not it can be recorded
            print(f"{RunPaths(run).attempts}: {error.strerror}", file=sys.stderr)
    with contextlib.suppress(*GONE):  # nobody may be reading, but the exit code may still count
        _report_end(group, run, console, stopped=bool(stops.received), hang=hang)
    return EXIT_HUNG if hang is not None else exit_code(group.codes)


def _close_attempt(run: Path, group: RankGroup, stopped: bool, hang: Hang | None) -> None:
    attempt = attempts.open_attempt(run)
    if attempt is None:  # where files cannot be locked, another launcher may have started and closed it
        return
    if hang is not None:
        attempts.close(run, attempt, Reason.HUNG, hang.nodes, codes=hang_codes(hang))
        return
    # With ssh, rank.sh records the exit codes: ssh's own codes say less.
    codes = attempts.exit_codes(run) or group.codes
    code, rank = exit_code(codes), failed_rank(codes)
    evidence = Evidence(
        codes=codes,
        srun_status=exit_code(group.codes),
        result=result_status(run),
        progressed=attempts.newest_step(run) > attempt.first_step,
        stop_requested=code == EXIT_SAVED_ON_USR1,  # nothing else sends USR1 here
        fruitless_before=0,
        max_restarts=0,
    )
    cut_short = stopped and rank is not None and _ended_by_stop(codes[rank])
    reason = Reason.TERMINATED if cut_short else decide(evidence).reason
    names = attempt.nodes.split(",")
    node = names[rank * len(names) // group.size] if rank is not None and len(names) > 1 else None
    attempts.close(run, attempt, reason, codes=codes, failed_node=node)


def _ended_by_stop(code: int) -> bool:
    """Was the rank ended by a signal that stops runs, before it could save?"""
    return ended_by(code) in (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL)


@dataclass
class _Stops:
    """Signals that this process received; the watching loop acts on them. The handlers only record."""

    received: list[int] = field(default_factory=list)
    _before: dict[int, object] = field(default_factory=dict)

    def __enter__(self) -> _Stops:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _record(self, number: int, _: FrameType | None) -> None:
        self.received.append(number)


def _watch(group: RankGroup, run: Path, started: float, view: View, stops: _Stops) -> Hang | None:
    """Returns the hang for which the ranks were ended."""
    pace, seen, deadline, hang = Pace(), 0, None, None
    hangs = _hang_watch(run, group)
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
            view.note("a rank did not exit after the save; ending it")
            group.stop(FAILURE_GRACE_SECONDS)
        if hang is None and (hang := hangs.look(group.codes)) is not None:
            view.note("the ranks hang; ending them")
            hang = record_hang(run, group.size, hang, lambda: group.signal(signal.SIGUSR2))
            group.kill()
    return hang


def _hang_watch(run: Path, group: RankGroup) -> HangWatch:
    from alignkd.config import load_run_config  # here: `status` imports this module, and must be quick

    attempt = attempts.open_attempt(run)
    names = attempt.nodes.split(",") if attempt is not None else []  # one where all ranks are on this machine
    nodes = [names[rank * len(names) // group.size] for rank in range(group.size)] if names else []
    training = load_run_config(RunPaths(run).config).training
    return HangWatch(run, group.size, nodes, training.hang_seconds, training.rendezvous_seconds)


def _read_stop_file(run: Path, stops: _Stops) -> None:
    """`alignkd stop` and `alignkd cancel` run in another terminal; they leave a file."""
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
        pass  # they are stopping already
    else:
        view.note("ending the ranks at once")
        group.kill()


def _report_end(group: RankGroup, run: Path, console: Console, stopped: bool, hang: Hang | None) -> None:
    rank = failed_rank(group.codes)
    if hang is not None:
        print(f"hung: {hang.message}", file=sys.stderr)
        say(console, f"resume from the newest checkpoint with: alignkd resume {shlex.quote(str(run))}")
    elif rank is None:
        if exit_code(group.codes) != 0:
            say(console, f"stopped and saved; resume with: alignkd resume {shlex.quote(str(run))}")
    elif stopped and _ended_by_stop(group.codes[rank]):
        print(f"{run}: ended before the ranks could save; earlier checkpoints are kept", file=sys.stderr)
    else:
        last = next(reversed(attempts.read_history(run)), None)
        node = last.failed_node if last is not None and last.failed_rank == rank else None
        print(failure_report(rank, group.codes[rank], log_of_failure(run, rank), node), file=sys.stderr)
