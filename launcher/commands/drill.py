"""``alignkd drill RUN``: proves on the cluster itself, before a long run, that a run comes back.

Two short runs are made from the run's configuration. One is left alone. The other is preempted, told to save
as before a time limit, and loses a rank; in the end both must have the same losses.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from alignkd.config import load_run_config
from alignkd.errors import AlignkdError, UserError
from alignkd.run_folder.atomic_files import read_json
from alignkd.run_folder.metrics import iter_rows
from alignkd.run_folder.paths import RunPaths, log_name
from launcher.backends.slurm.client import ask, hostnames, queued_jobs
from launcher.backends.slurm.lifecycle import Reason
from launcher.commands.control import start_run
from launcher.commands.launch import LaunchRequest, write_run
from launcher.run.attempts import Attempt, open_attempt, read_history
from launcher.run.exit_codes import ATTEMPT_PREFIX
from launcher.run.manifest import Manifest, read_manifest

SLURM_SECONDS = 30.0  # between two questions to Slurm
PATIENCE_SECONDS = 4 * 3600.0  # with each wait: a job may be queued for long
LATE_SECONDS = 120.0  # until the log of a rank on another node is seen here
LOSS_TOLERANCE = 1e-6
LONGEST_NAME = 80  # of the run, in the names of the short runs; run.name may have 100 characters


@dataclass(frozen=True)
class Finding:
    ok: bool
    text: str


@dataclass(frozen=True)
class Event:
    """Something that is done to a job, and what it must look like afterwards."""

    name: str
    command: Callable[[Path, Attempt, Manifest], tuple[str, ...]]
    saves: bool  # are the ranks told before they are ended?


# The children of rank.sh are killed, which is the rank alone: rank.sh lives to write down how it ended.
_KILL = 'kill -KILL $(cat "/proc/$1/task/$1/children")'
_PLACE = re.compile(rf"{ATTEMPT_PREFIX}(\d+): job \S+ on (\S+), process (\d+),")


def events(preempt_with: Sequence[str]) -> tuple[Event, ...]:
    """``preempt_with`` are the sbatch options of a job that preempts; none: the preemption is played."""
    if preempt_with:
        first = Event("a preemption", lambda run, attempt, _: _preempting(run, attempt, preempt_with), True)
    else:
        first = Event(
            "a requeue by scontrol, in the place of a preemption (no --preempt-with)",
            lambda run, attempt, _: ("scontrol", "requeue", attempt.job),
            True,
        )
    warning = Event(
        "SIGUSR1, as before a time limit",
        lambda run, attempt, _: ("scancel", "--signal=USR1", attempt.job),
        True,
    )
    return first, warning, Event("one killed rank", _killing, False)


def _preempting(run: Path, attempt: Attempt, options: Sequence[str]) -> tuple[str, ...]:
    """A job that wants the nodes of this one, and ends at once."""
    count = len(hostnames(attempt.nodes))
    own = ("--output=/dev/null", f"--nodes={count}", f"--nodelist={attempt.nodes}")
    return ("sbatch", f"--job-name={run.name}-preempts", *own, *options, "--wrap=true")


def _killing(run: Path, attempt: Attempt, manifest: Manifest) -> tuple[str, ...]:
    """Kill the last rank, where its log says that it is."""
    log = RunPaths(run).log(manifest.world_size - 1)
    end = time.monotonic() + LATE_SECONDS
    while (place := _place(log, attempt.number)) is None:
        if time.monotonic() > end:
            raise AlignkdError(f"{log}: does not say where the rank of attempt {attempt.number} is")
        time.sleep(1)
    node, process = place
    step = ("srun", f"--jobid={attempt.job}", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={node}")
    return (*step, "--mem=0", "--mpi=none", "--chdir=/", "bash", "-c", _KILL, "kill", process)


def _place(log: Path, attempt: int) -> tuple[str, str] | None:
    """Node and process of a rank, as its log begins; None while a shared file system does not show it yet."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    places = {int(number): (node, process) for number, node, process in _PLACE.findall(text)}
    return places.get(attempt)


def drill(
    run: Path,
    steps: int,
    console: Console,
    preempt_with: Sequence[str] = (),
    slurm_seconds: float = SLURM_SECONDS,
) -> Iterator[Finding]:
    """What the cluster grants, one finding after the other; ``steps`` is the length of the short runs.

    Raises UserError when ``run`` is not Slurm's, AlignkdError when a short run is gone or nothing happens.
    """
    manifest = read_manifest(run)
    if manifest.backend != "slurm":
        raise UserError(f"{run}: made for the {manifest.backend} back end; a drill is for a cluster")
    whole, cut = (_short_run(run, manifest, name, steps) for name in _free_names(run))
    _, whole_job = start_run(whole, manifest, console)
    if preempt_with:  # it may be placed on the same nodes, and would not be left alone
        _wait(whole, lambda: _is_done(whole) or _gave_up(whole) is not None, slurm_seconds)
    _, job = start_run(cut, manifest, console)
    assert job is not None
    for short, number, what in ((whole, whole_job, "left alone"), (cut, job, "interrupted")):
        console.print(f"{short}: job {number}, {what}", markup=False, highlight=False, soft_wrap=True)
    if "Requeue=1" not in (ask("scontrol", "show", "job", "--oneliner", job) or ""):
        yield Finding(False, "the job may not be requeued here; set slurm.requeue: false for chained jobs")
    for event in events(preempt_with):
        yield (finding := _try(event, cut, manifest, slurm_seconds))
        if _gave_up(cut) is not None or (not finding.ok and _is_done(cut)):
            return
    for short in (whole, cut):
        _wait(short, lambda short=short: _is_done(short), slurm_seconds)  # type: ignore[misc]
    yield _folder_finding(cut, manifest)
    yield _loss_finding(_losses(whole), _losses(cut))


def _free_names(run: Path) -> tuple[str, str]:
    """Of the two short runs, beside those of earlier drills."""
    number = 1
    while True:
        start = f"{run.name[:LONGEST_NAME]}-drill{'' if number == 1 else f'-{number}'}"
        names = f"{start}-whole", f"{start}-cut"
        if not any(os.path.lexists(run.parent / name) for name in names):
            return names
        number += 1


def _short_run(run: Path, manifest: Manifest, name: str, steps: int) -> Path:
    folder = json.dumps(str(run.parent), ensure_ascii=False)
    overrides = [f'run.name="{name}"', f"run.folder={folder}", f"training.max_steps={steps}"]
    overrides.append(f"checkpoint.every={max(1, steps // 8)}")
    request = LaunchRequest(RunPaths(run).config, manifest.nodes, manifest.gpus_per_node, "slurm")
    _, short = write_run(load_run_config(RunPaths(run).config, overrides), request, "slurm")
    # It may have been edited by hand.
    shutil.copy(RunPaths(run).environment_script, RunPaths(short).environment_script)
    return short


def _try(event: Event, run: Path, manifest: Manifest, slurm_seconds: float) -> Finding:
    """Wait until the attempt has made some steps, do it, and look at the attempt that follows."""
    number = len(read_history(run)) + 1

    def is_over() -> bool:
        return _is_done(run) or _gave_up(run) is not None

    _wait(run, lambda: _made_progress(run, number) or is_over(), slurm_seconds)
    attempt = open_attempt(run)
    if attempt is None:
        over = _gave_up(run) or "the short run was over before; give it more --steps"
        return Finding(False, f"{event.name}: {over}")
    command = event.command(run, attempt, manifest)
    if ask(*command) is None:
        return Finding(False, f"{event.name}: refused by Slurm ({shlex.join(command)})")
    _wait(
        run,
        lambda: ((now := open_attempt(run)) is not None and now.number > number) or is_over(),
        slurm_seconds,
    )
    following = open_attempt(run)
    ended = read_history(run)[number - 1]
    if following is None:
        return Finding(False, f"{event.name}: {_gave_up(run) or 'it came too late, or changed nothing'}")
    if following.first_step != ended.saved_step:
        text = f"went on at step {following.first_step} instead of {ended.saved_step}"
        return Finding(False, f"{event.name}: {text}")
    text = f"{event.name}: went on at step {following.first_step} after {_waited(ended.end, following.start)}"
    if event.saves and (ended.lost_steps or 0) > 0:
        return Finding(False, f"{text}, but {ended.lost_steps} steps were lost: too short a grace to save")
    if event.name == "a preemption" and ended.reason != Reason.PREEMPTED:
        return Finding(False, f"{text}, but the attempt ended as: {ended.reason}")
    return Finding(True, text)


def _waited(end: float | None, start: float) -> str:
    return f"{start - (end or start):.0f} s"


def _made_progress(run: Path, number: int) -> bool:
    attempt = open_attempt(run)
    progress = read_json(RunPaths(run).progress) or {}
    if attempt is None or attempt.number != number or progress.get("updated", 0) < attempt.start:
        return False
    return int(progress.get("step") or 0) >= attempt.first_step + 2


def _gave_up(run: Path) -> str | None:
    """Why the run will not start again by itself; None when it may."""
    history = read_history(run)
    if open_attempt(run) is not None or not history or history[-1].reason != Reason.BAD_INPUT:
        return None
    if history[-1].bad_nodes:
        nodes = ", ".join(history[-1].bad_nodes)
        return f"the run folder is not seen by {nodes}: it must lie on a shared file system"
    return f"the run failed: see alignkd logs {run} --errors"


def _is_done(run: Path) -> bool:
    return (read_json(RunPaths(run).result) or {}).get("status") == "done" and open_attempt(run) is None


def _wait(run: Path, condition: Callable[[], bool], slurm_seconds: float) -> None:
    """Files are looked at often, and Slurm now and then, whether there is still a job to wait for."""
    end, asked = time.monotonic() + PATIENCE_SECONDS, time.monotonic()
    while not condition():
        now = time.monotonic()
        if now > end:
            raise AlignkdError(f"{run}: nothing has happened for {PATIENCE_SECONDS / 3600:.0f} hours")
        if now - asked > slurm_seconds:
            asked = now
            if queued_jobs(run) == [] and not condition():
                raise AlignkdError(f"{run}: its job is gone; see: alignkd logs {run} --errors")
        time.sleep(0.1)


def _folder_finding(run: Path, manifest: Manifest) -> Finding:
    logs = len(list(RunPaths(run).logs.glob(log_name("*"))))
    seen = logs == manifest.world_size and RunPaths(run).attempts.exists()
    text = f"{logs} of {manifest.world_size} ranks wrote into the run folder"
    return Finding(seen, text if seen else f"{text}: it is not on a file system that every node sees")


def _losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in iter_rows(RunPaths(run).metrics)}


def _loss_finding(whole: dict[int, float], cut: dict[int, float]) -> Finding:
    if whole.keys() != cut.keys():
        return Finding(False, f"{len(cut)} steps were made instead of {len(whole)}")
    worst = max((abs(whole[step] - cut[step]), step) for step in whole)
    if worst[0] <= LOSS_TOLERANCE:
        return Finding(True, f"the losses of all {len(whole)} steps are those of the run that was left alone")
    return Finding(False, f"losses differ by up to {worst[0]:.2g} (step {worst[1]})")
