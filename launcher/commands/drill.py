"""``alignkd drill RUN``: prove on the cluster itself, before a long run, that a run survives interruptions.

Two short runs are made from the run's configuration. One is left alone. The other is preempted, told to save
as before a time limit, and loses a rank; both must end with the same losses.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from alignkd.config import load_run_config
from alignkd.errors import AlignkdError, UserError
from alignkd.run_folder.metrics import iter_rows
from alignkd.run_folder.paths import RunPaths, log_name
from alignkd.run_folder.progress import read_snapshot
from alignkd.run_folder.result import result_status
from launcher.backends import backend_named
from launcher.backends.slurm.client import queued_jobs, run_slurm_command
from launcher.backends.slurm.drill_events import Event, events
from launcher.backends.slurm.job_facts import may_be_requeued
from launcher.commands.control import start_run
from launcher.commands.launch import write_run
from launcher.plan.workload import Cluster
from launcher.run.attempts import Reason, open_attempt, read_history
from launcher.run.console import say
from launcher.run.manifest import Manifest, read_manifest

SLURM_SECONDS = 30.0  # between two queries to Slurm
PATIENCE_SECONDS = 4 * 3600.0  # for each wait: a job may be queued for long
LOSS_TOLERANCE = 1e-6
LONGEST_NAME = 80  # of the run's name in those of the short runs; run.name may have 100 characters


@dataclass(frozen=True)
class Finding:
    ok: bool
    text: str


def drill(
    run: Path,
    steps: int,
    console: Console,
    preempt_with: Sequence[str] = (),
    slurm_seconds: float = SLURM_SECONDS,
) -> Iterator[Finding]:
    """Yield the findings one by one; ``steps`` is the length of the short runs.

    Raises UserError when ``run`` has no queue to come back from, AlignkdError when the job of a short run
    vanishes or nothing happens.
    """
    manifest = read_manifest(run)
    if not backend_named(manifest.backend).has_queue:
        raise UserError(f"{run}: made for the {manifest.backend} back end; a drill needs a Slurm cluster")
    whole, cut = (_short_run(run, manifest, name, steps) for name in _free_names(run))
    _, whole_job = start_run(whole, manifest, console)
    if preempt_with:  # on the same nodes it would be preempted too
        _wait(whole, lambda: _is_done(whole) or _gave_up(whole) is not None, slurm_seconds)
    _, job = start_run(cut, manifest, console)
    assert job is not None
    for short, number, what in ((whole, whole_job, "left alone"), (cut, job, "interrupted")):
        say(console, f"{short}: job {number}, {what}")
    if may_be_requeued(job) is False:
        yield Finding(False, "this cluster does not requeue the job; set slurm.requeue: false to chain jobs")
    for event in events(preempt_with):
        yield (finding := _try(event, cut, manifest, slurm_seconds))
        if _gave_up(cut) is not None or (not finding.ok and _is_done(cut)):
            return
    for short in (whole, cut):
        _wait(short, lambda short=short: _is_done(short), slurm_seconds)  # type: ignore[misc]
    yield _folder_finding(cut, manifest)
    yield _loss_finding(_losses(whole), _losses(cut))


def _free_names(run: Path) -> tuple[str, str]:
    """Names of the two short runs that no earlier drill has taken."""
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
    cluster = Cluster(manifest.nodes, manifest.gpus_per_node)
    short = write_run(load_run_config(RunPaths(run).config, overrides), cluster, manifest.backend)
    # It may have been edited by hand.
    shutil.copy(RunPaths(run).environment_script, RunPaths(short).environment_script)
    return short


def _try(event: Event, run: Path, manifest: Manifest, slurm_seconds: float) -> Finding:
    """Wait for some steps, interrupt the attempt, and judge the attempt that follows."""
    number = len(read_history(run)) + 1

    def is_over() -> bool:
        return _is_done(run) or _gave_up(run) is not None

    _wait(run, lambda: _made_progress(run, number) or is_over(), slurm_seconds)
    attempt = open_attempt(run)
    if attempt is None:
        over = _gave_up(run) or "the short run ended before it; give it more --steps"
        return Finding(False, f"{event.name}: {over}")
    command = event.command(run, attempt, manifest)
    if run_slurm_command(*command) is None:
        return Finding(False, f"{event.name}: refused by Slurm ({shlex.join(command)})")
    _wait(
        run,
        lambda: ((now := open_attempt(run)) is not None and now.number > number) or is_over(),
        slurm_seconds,
    )
    following = open_attempt(run)
    ended = read_history(run)[number - 1]
    if following is None:
        return Finding(False, f"{event.name}: {_gave_up(run) or 'it came too late or had no effect'}")
    if following.first_step != ended.saved_step:
        text = f"resumed at step {following.first_step} instead of {ended.saved_step}"
        return Finding(False, f"{event.name}: {text}")
    pause = following.start - (ended.end or following.start)
    text = f"{event.name}: resumed at step {following.first_step} after {pause:.0f} s"
    if event.saves and (ended.lost_steps or 0) > 0:
        return Finding(False, f"{text}, but lost {ended.lost_steps} steps: the grace is too short for a save")
    if event.name == "a preemption" and ended.reason != Reason.PREEMPTED:
        return Finding(False, f"{text}, but the attempt was recorded as: {ended.reason}")
    return Finding(True, text)


def _made_progress(run: Path, number: int) -> bool:
    attempt = open_attempt(run)
    if attempt is None or attempt.number != number:
        return False
    progress = read_snapshot(RunPaths(run).progress, since=attempt.start)
    return progress is not None and progress.step >= attempt.first_step + 2


def _gave_up(run: Path) -> str | None:
    """Why the run will not restart by itself; None when it may."""
    history = read_history(run)
    if open_attempt(run) is not None or not history or history[-1].reason != Reason.BAD_INPUT:
        return None
    if history[-1].bad_nodes:
        nodes = ", ".join(history[-1].bad_nodes)
        return f"{nodes} cannot see a folder of the run: see alignkd logs {run} --job"
    return f"the run failed: see alignkd logs {run} --errors"


def _is_done(run: Path) -> bool:
    return result_status(run) == "done" and open_attempt(run) is None


def _wait(run: Path, condition: Callable[[], bool], slurm_seconds: float) -> None:
    """Poll files often, and ask Slurm now and then whether there still is a job to wait for."""
    end, asked = time.monotonic() + PATIENCE_SECONDS, time.monotonic()
    while not condition():
        now = time.monotonic()
        if now > end:
            raise AlignkdError(f"{run}: nothing has happened for {PATIENCE_SECONDS / 3600:.0f} hours")
        if now - asked > slurm_seconds:
            asked = now
            if queued_jobs(run) == [] and not condition():
                raise AlignkdError(f"{run}: its job has vanished; see: alignkd logs {run} --errors")
        time.sleep(0.1)


def _folder_finding(run: Path, manifest: Manifest) -> Finding:
    logs = len(list(RunPaths(run).logs.glob(log_name("*"))))
    seen = logs == manifest.world_size and RunPaths(run).attempts.exists()
    text = f"{logs} of {manifest.world_size} ranks wrote to the run folder"
    return Finding(seen, text if seen else f"{text}: it must be on a file system that every node sees")


def _losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in iter_rows(RunPaths(run).metrics)}


def _loss_finding(whole: dict[int, float], cut: dict[int, float]) -> Finding:
    if whole.keys() != cut.keys():
        return Finding(False, f"{len(cut)} steps instead of {len(whole)}")
    worst = max((abs(whole[step] - cut[step]), step) for step in whole)
    if worst[0] <= LOSS_TOLERANCE:
        return Finding(True, f"the losses of all {len(whole)} steps equal those of the uninterrupted run")
    return Finding(False, f"losses differ by up to {worst[0]:.2g} (step {worst[1]})")
