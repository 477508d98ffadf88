"""``stop``, ``cancel``, ``resume`` and the start of a run that has its folder."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from alignkd.config import load_run_config
from alignkd.config.combinations import counted
from alignkd.errors import AlignkdError, UserError
from alignkd.run_folder.atomic_files import read_json, write_json, write_text_atomic
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.save_times import lead_warning, measured_stop_seconds
from launcher.backends.hostfile import Host
from launcher.backends.local import run_local
from launcher.backends.slurm.client import (
    QueuedJob,
    cancel_job,
    in_allocation,
    is_running,
    queued_jobs,
    signal_ranks,
    submit,
)
from launcher.backends.slurm.stages import hand_on
from launcher.backends.ssh import run_ssh
from launcher.commands.resize import fit_run, memory_warnings
from launcher.commands.status import inspect_run
from launcher.render.deepspeed import batch_split
from launcher.run.attempts import open_attempt, read_history, slurm_step
from launcher.run.checkpoints import changes_allowed, check_changes, check_step, gone_back
from launcher.run.lock import only_launcher
from launcher.run.manifest import Manifest, read_manifest


def start_run(
    run: Path, manifest: Manifest, console: Console, after: str | None = None
) -> tuple[int, str | None]:
    """Start, or go on: (exit code, job id). The local back end and an allocation return at the end.

    A submitted job waits until job ``after`` has ended well. Raises UserError when another launcher has it.
    """
    with only_launcher(run):
        RunPaths(run).stop.unlink(missing_ok=True)  # meant for a start before this one
        return _start(run, manifest, console, after)


def _start(
    run: Path, manifest: Manifest, console: Console, after: str | None = None
) -> tuple[int, str | None]:
    if manifest.backend == "slurm":
        signal_seconds = load_run_config(RunPaths(run).config).slurm.signal_seconds
        if (warning := lead_warning(measured_stop_seconds(run), signal_seconds)) is not None:
            _say(console, f"warning: {warning}")
    if manifest.backend == "local":
        return run_local(run, manifest, console), None
    if manifest.backend == "ssh":
        return run_ssh(run, manifest, console), None
    if manifest.backend != "slurm":
        raise UserError(f"{run / 'manifest.json'}: backend {manifest.backend} is none of local, slurm, ssh")
    if in_allocation():
        _say(console, f"using the allocation {os.environ['SLURM_JOB_ID']}")
        _note_submission(run, os.environ["SLURM_JOB_ID"])
        # The batch script by hand: same ranks, same verdict, but nothing is requeued.
        environment = {**os.environ, "ALIGNKD_RUN": str(run)}
        # Ctrl-C is for srun, which has the terminal too. This process must not die of it and kill the script:
        # the ranks would train on, and nobody would write down how they end.
        before = signal.signal(signal.SIGINT, lambda *_: None)
        try:
            return subprocess.run(["bash", str(RunPaths(run).job_script)], env=environment).returncode, None
        finally:
            signal.signal(signal.SIGINT, before)
    job = submit(run, [f"--dependency=afterok:{after}"] if after else [])
    _note_submission(run, job)
    hand_on(run, job)
    return 0, job


def _note_submission(run: Path, job: str) -> None:
    """Failures before this moment do not count towards slurm.max_restarts."""
    write_json(
        RunPaths(run).job, {"job": job, "submitted": time.time(), "attempts_before": len(read_history(run))}
    )


@dataclass(frozen=True)
class ResumeRequest:
    """None and empty: as the run was."""

    nodes: int | None = None
    gpus_per_node: int | None = None
    hosts: tuple[Host, ...] = ()  # of the ssh back end
    step: int | None = None  # checkpoint to go back to
    allowed_changes: tuple[str, ...] = ()  # keys that may differ from the checkpoint's


def resume_run(run: Path, request: ResumeRequest, console: Console) -> dict[str, Any]:
    """Go on with a run from its newest checkpoint, or an explicit one, at the same size or another.

    Raises UserError when it cannot, or runs already; the run folder is as it was then. When sbatch refuses,
    the run is only made for the other size.
    """
    run = Path(os.path.abspath(run))
    read_manifest(run)
    check_changes(run, request.allowed_changes)
    result = read_json(RunPaths(run).result) or {}
    if request.step is not None:
        check_step(run, request.step)
    elif result.get("status") == "done":
        _say(console, f"{run} is done: {result.get('step')} of {result.get('total_steps')} steps")
        return {"run": str(run), "state": "done", "code": 0, "job": None}
    with only_launcher(run):  # before anything is changed: two may have been typed at once
        code, job = _go_on(run, request, console)
    return {"run": str(run), "state": "queued" if job else "ended", "code": code, "job": job}


def _go_on(run: Path, request: ResumeRequest, console: Console) -> tuple[int, str | None]:
    manifest = read_manifest(run)
    if manifest.backend == "slurm":
        _refuse_second_job(run)
    RunPaths(run).stop.unlink(missing_ok=True)  # meant for a start before this one
    before = manifest.world_size
    manifest = fit_run(run, manifest, request.nodes, request.gpus_per_node, request.hosts, request.step)
    if manifest.world_size != before:
        split = batch_split(load_run_config(RunPaths(run).config).training, manifest.world_size)
        _say(console, f"now for {counted(manifest.world_size, 'rank')} instead of {before}; {split}")
        for warning in memory_warnings(run, manifest):
            _say(console, f"warning: {warning}")
    # Both are taken back when the start is refused (by sbatch, say).
    with changes_allowed(run, request.allowed_changes), gone_back(run, request.step) as kept:
        for name in kept:
            _say(console, f"kept, out of the way: {name}")
        _say(console, f"resuming {run} on {counted(manifest.world_size, 'rank')} ({manifest.backend})")
        return _start(run, manifest, console)


def _refuse_second_job(run: Path) -> None:
    """Raises UserError when a job trains the run, or will: its files must not change under it."""
    own = os.environ["SLURM_JOB_ID"] if in_allocation() else None
    jobs = queued_jobs(run)
    if jobs:
        raise UserError(f"{run}: job {jobs[0].id} is {jobs[0].state.lower()} already; see `alignkd status`")
    attempt = open_attempt(run)  # of an allocation: no script in the queue tells of it
    if attempt is not None and attempt.job != own and is_running(attempt.job):
        raise UserError(f"{run}: job {attempt.job} is training it")


def live_jobs(run: Path) -> list[QueuedJob] | None:
    """Jobs that train the run, or will; None when Slurm does not answer.

    One without a script is not the run's own: an allocation, or a job whose script has started the run.
    """
    jobs, attempt = queued_jobs(run), open_attempt(run)
    if jobs == [] and attempt is not None and is_running(attempt.job):
        return [QueuedJob(attempt.job, "RUNNING", "None", None, "")]
    return jobs


def stop_run(run: Path) -> dict[str, Any]:
    """Ask a run to save and to stop, without a requeue."""
    run, manifest, jobs = _live(run)
    # The file first: it tells the batch script that this USR1 is no time limit, and ranks that are about to
    # start that they are not wanted any more.
    _note(run, "USR1", jobs)
    if manifest.backend != "slurm":
        return {"run": str(run), "job": None, "action": "asked its launcher to save and stop"}
    # Asked again: a script that submits the next job of the run looks for the file when it has done so.
    jobs = live_jobs(run) or jobs
    running = [job for job in jobs if job.state != "PENDING"]
    for job in jobs:
        if job.state == "PENDING":
            cancel_job(job.id)
    if not running:
        RunPaths(run).stop.unlink(missing_ok=True)
        return {"run": str(run), "job": jobs[0].id, "action": "taken out of the queue"}
    for job in running:
        _signal(run, job, "USR1")
    return {"run": str(run), "job": running[0].id, "action": "asked to save and stop"}


def cancel_run(run: Path) -> dict[str, Any]:
    """Cancel a run's jobs. The ranks are told by SIGTERM and save if the cluster grants the time."""
    run, manifest, jobs = _live(run)
    # The file first: scancel comes too late for a script that has just decided to go on, which requeues the
    # job or submits the next one all the same. That start reads the file.
    _note(run, "TERM", jobs)
    if manifest.backend != "slurm":
        return {"run": str(run), "job": None, "action": "cancelled"}
    jobs = live_jobs(run) or jobs
    for job in jobs:
        if job.script:
            cancel_job(job.id)
        else:  # an allocation stays the user's
            _signal(run, job, "TERM")
    if all(job.state == "PENDING" for job in jobs):
        RunPaths(run).stop.unlink(missing_ok=True)
    own = all(job.script for job in jobs)
    action = "cancelled" if own else "asked the ranks to save and leave; the allocation stays"
    return {"run": str(run), "job": jobs[0].id, "action": action}


def _note(run: Path, name: str, jobs: list[QueuedJob]) -> None:
    write_text_atomic(RunPaths(run).stop, " ".join([name, *(job.id for job in jobs)]) + "\n")


def _signal(run: Path, job: QueuedJob, name: str) -> None:
    """To the ranks alone. In an allocation these are one step of several: the user's shell is one, too."""
    if job.state in ("COMPLETING", "CONFIGURING"):
        return  # nobody is there to hear it, and scancel fails; a start that follows reads the file
    step = job.id if job.script else slurm_step(run)
    if step is not None and not signal_ranks(step, name):  # None: they are yet to start, and read the file
        raise AlignkdError(f"scancel could not signal job {step}")


def _live(run: Path) -> tuple[Path, Manifest, list[QueuedJob]]:
    run = Path(os.path.abspath(run))
    manifest = read_manifest(run)
    on_slurm = manifest.backend == "slurm"
    jobs = live_jobs(run) if on_slurm else []
    if jobs is None:
        raise UserError("Slurm does not answer here; do this on a login node of the cluster")
    if not jobs and (on_slurm or inspect_run(run, None).state != "running"):
        raise UserError(f"{run} is {inspect_run(run, jobs).state}; there is nothing to stop")
    return run, manifest, jobs


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
