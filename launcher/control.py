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

from alignkd.checkpoint.timing import lead_warning, measured_stop_seconds
from alignkd.config import load_config
from alignkd.config.combinations import counted
from alignkd.errors import AlignkdError, UserError
from launcher.attempts import JOB, STOP, open_attempt, read_history
from launcher.checkpoints import check_step, go_back
from launcher.files import read_json, write_atomic, write_json
from launcher.hostfile import Host
from launcher.local import run_local
from launcher.manifest import Manifest, read_manifest
from launcher.resize import fit_run, memory_warnings
from launcher.run_state import inspect_run, is_locked
from launcher.slurm import (
    QueuedJob,
    cancel_job,
    in_allocation,
    is_running,
    queued_jobs,
    signal_ranks,
    submit,
)
from launcher.ssh import run_ssh
from launcher.stages import hand_on


def start_run(
    run: Path, manifest: Manifest, console: Console, after: str | None = None
) -> tuple[int, str | None]:
    """Start, or go on: (exit code, job id). The local back end and an allocation return at the end.

    A submitted job waits until job ``after`` has ended well.
    """
    if manifest.backend == "slurm":
        signal_seconds = load_config(run / "config.yaml").slurm.signal_seconds
        if (warning := lead_warning(measured_stop_seconds(run), signal_seconds)) is not None:
            console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    if manifest.backend == "local":
        return run_local(run, manifest, console), None
    if manifest.backend == "ssh":
        return run_ssh(run, manifest, console), None
    if manifest.backend != "slurm":
        raise UserError(f"{run / 'manifest.json'}: backend {manifest.backend} is none of local, slurm, ssh")
    (run / STOP).unlink(missing_ok=True)  # meant for a start before this one
    if in_allocation():
        console.print(f"using the allocation {os.environ['SLURM_JOB_ID']}", markup=False, highlight=False)
        _note_submission(run, os.environ["SLURM_JOB_ID"])
        # The batch script by hand: same ranks, same verdict, but nothing is requeued.
        environment = {**os.environ, "ALIGNKD_RUN": str(run)}
        # Ctrl-C is for srun, which has the terminal too. This process must not die of it and kill the script:
        # the ranks would train on, and nobody would write down how they end.
        before = signal.signal(signal.SIGINT, lambda *_: None)
        try:
            return subprocess.run(["bash", str(run / "job.sbatch")], env=environment).returncode, None
        finally:
            signal.signal(signal.SIGINT, before)
    job = submit(run, [f"--dependency=afterok:{after}"] if after else [])
    _note_submission(run, job)
    hand_on(run, job)
    return 0, job


def _note_submission(run: Path, job: str) -> None:
    """Failures before this moment do not count towards slurm.max_restarts."""
    write_json(run / JOB, {"job": job, "submitted": time.time(), "attempts_before": len(read_history(run))})


@dataclass(frozen=True)
class ResumeRequest:
    """None and empty: as the run was."""

    nodes: int | None = None
    gpus_per_node: int | None = None
    hosts: tuple[Host, ...] = ()  # of the ssh back end
    step: int | None = None  # checkpoint to go back to


def resume_run(run: Path, request: ResumeRequest, console: Console) -> dict[str, Any]:
    """Go on with a run from its newest checkpoint, or an explicit one, at the same size or another.

    Raises UserError when it cannot, or runs already; the run folder is as it was then.
    """
    run = Path(os.path.abspath(run))
    manifest = read_manifest(run)
    result = read_json(run / "result.json") or {}
    if request.step is not None:
        check_step(run, request.step)
    elif result.get("status") == "done":
        steps = f"{result.get('step')} of {result.get('total_steps')} steps"
        console.print(f"{run} is done: {steps}", markup=False, highlight=False, soft_wrap=True)
        return {"run": str(run), "state": "done", "code": 0, "job": None}
    if manifest.backend == "slurm":
        _refuse_second_job(run)
    if is_locked(run):
        raise UserError(f"{run}: another launcher runs it; wait for it, or stop it with Ctrl-C")
    before = manifest.world_size
    manifest = fit_run(run, manifest, request.nodes, request.gpus_per_node, request.hosts, request.step)
    if manifest.world_size != before:
        micro_batches = f"{counted(manifest.accumulation_steps, 'micro-batch')} of each a step"
        text = f"now for {counted(manifest.world_size, 'rank')} instead of {before}, {micro_batches}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        for warning in memory_warnings(run, manifest):
            console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    for name in go_back(run, request.step) if request.step is not None else ():
        console.print(f"kept, out of the way: {name}", markup=False, highlight=False, soft_wrap=True)
    text = f"resuming {run} on {counted(manifest.world_size, 'rank')} ({manifest.backend})"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    code, job = start_run(run, manifest, console)
    return {"run": str(run), "state": "queued" if job else "ended", "code": code, "job": job}


def _refuse_second_job(run: Path) -> None:
    """Raises UserError when a job trains the run, or will: its files must not change under it."""
    own = os.environ["SLURM_JOB_ID"] if in_allocation() else None
    jobs = queued_jobs(run)
    if jobs:
        raise UserError(f"{run}: job {jobs[0].id} is {jobs[0].state.lower()} already; see `alignkd status`")
    attempt = open_attempt(run)  # of an allocation: no script in the queue tells of it
    if attempt is not None and attempt.job != own and is_running(attempt.job):
        raise UserError(f"{run}: job {attempt.job} is training it")


def stop_run(run: Path) -> dict[str, Any]:
    """Ask a run to save and to stop, without a requeue."""
    run, manifest, jobs = _live(run)
    if manifest.backend != "slurm":
        write_atomic(run / STOP, "USR1\n")
        return {"run": str(run), "job": None, "action": "asked its launcher to save and stop"}
    running = [job for job in jobs if job.state != "PENDING"]
    for job in jobs:
        if job.state == "PENDING":
            cancel_job(job.id)
    if not running:
        return {"run": str(run), "job": jobs[0].id, "action": "taken out of the queue"}
    # The file first: it tells the batch script that this USR1 is no time limit.
    write_atomic(run / STOP, "USR1\n")
    for job in running:
        if not signal_ranks(job.id):
            raise AlignkdError(f"scancel could not signal job {job.id}")
    return {"run": str(run), "job": running[0].id, "action": "asked to save and stop"}


def cancel_run(run: Path) -> dict[str, Any]:
    """Cancel a run's jobs. The ranks are told by SIGTERM and save if the cluster grants the time."""
    run, manifest, jobs = _live(run)
    if manifest.backend != "slurm":
        write_atomic(run / STOP, "TERM\n")
        return {"run": str(run), "job": None, "action": "cancelled"}
    for job in jobs:
        cancel_job(job.id)
    return {"run": str(run), "job": jobs[0].id, "action": "cancelled"}


def _live(run: Path) -> tuple[Path, Manifest, list[QueuedJob]]:
    run = Path(os.path.abspath(run))
    manifest = read_manifest(run)
    on_slurm = manifest.backend == "slurm"
    jobs = queued_jobs(run) if on_slurm else []
    if jobs is None:
        raise UserError("Slurm does not answer here; do this on a login node of the cluster")
    if not jobs and (on_slurm or inspect_run(run, None).state != "running"):
        raise UserError(f"{run} is {inspect_run(run, jobs).state}; there is nothing to stop")
    return run, manifest, jobs
