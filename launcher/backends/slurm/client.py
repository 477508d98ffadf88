"""Queries and requests to Slurm through its own commands (the output of ``--json`` changes between versions).

What follows from the answers is decided elsewhere: ``backend``, ``lifecycle``, ``batch``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from alignkd.errors import AlignkdError, UserError
from alignkd.run_folder.atomic_files import read_json
from alignkd.run_folder.paths import JOB_SCRIPT, RunPaths
from launcher.backends.base import JobEnd, QueuedJob
from launcher.backends.slurm.lifecycle import JobState

_FINAL = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "TIMEOUT"),
)
_SECONDS = 30  # until a command counts as not answering


def in_allocation() -> bool:
    """Is this the shell of a `salloc`? A job or a step is not: they have a process id within the job."""
    interactive = os.environ.get("SLURM_STEP_ID") == "4294967290"  # salloc with use_interactive_step
    return "SLURM_JOB_ID" in os.environ and ("SLURM_PROCID" not in os.environ or interactive)


def clean_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment without the variables of a surrounding job: sbatch would read ``SLURM_*`` as options of
    the new job."""
    inherited = ("SLURM_", "SBATCH_", "SRUN_", "ALIGNKD_RUN", "ALIGNKD_ATTEMPT")
    return {k: v for k, v in environment.items() if k == "SLURM_CONF" or not k.startswith(inherited)}


def run_slurm_command(*command: str) -> str | None:
    """What a Slurm command prints; None when it is not installed, fails or does not answer."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_SECONDS,
            env=clean_environment(),
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def slurm_is_installed() -> bool:
    return shutil.which("sbatch") is not None


def slurm_answers() -> bool:
    """Does a Slurm controller answer from here?"""
    return "UP" in (run_slurm_command("scontrol", "ping") or "")


def _job_text(job: str) -> str | None:
    return run_slurm_command("scontrol", "show", "job", "--oneliner", job)


def field_of(text: str, name: str) -> str | None:
    """A field of ``scontrol show``; None where it has no value."""
    # The first match: free text (the command, a comment) comes after all fields that are read here.
    found = re.search(rf"(?:^|\s){name}=(\S+)", text)
    return found[1] if found and found[1] not in ("None", "Unknown", "N/A", "(null)") else None


def job_state(job: str) -> JobState:
    """State of the job that this script belongs to. Without an answer: of a job that Slurm leaves alone."""
    text = _job_text(job)
    if text is None:
        return JobState()
    return JobState(
        state=field_of(text, "JobState") or "RUNNING",
        reason=field_of(text, "Reason") or "None",
        preempted=field_of(text, "PreemptTime") is not None,
        requeued=int(field_of(text, "Restarts") or 0) > int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    )


def job_end(job: str) -> JobEnd | None:
    """Slurm forgets a job some minutes after its end (MinJobAge)."""
    text = _job_text(job)
    state = None if text is None else field_of(text, "JobState")
    if text is None or state not in _FINAL:
        return None
    comment = re.search(r"\sComment=(.*?)(?= \w+=|$)", text)  # free text, with spaces
    return JobEnd(state, comment[1].strip() if comment else None)


def hostnames(nodes: str) -> list[str]:
    """``n[1-2]`` as ``n1`` and ``n2``, in the order of the ranks."""
    return (run_slurm_command("scontrol", "show", "hostnames", nodes) or "").split()


def lost_nodes(nodes: str, since: float) -> list[str]:
    """Nodes of a list (``n[1-4]``) that Slurm cannot reach, or that booted after ``since`` (Unix time)."""
    text = run_slurm_command("scontrol", "show", "node", "--oneliner", nodes) if nodes else None
    return [
        name
        for line in (text or "").splitlines()
        if (name := field_of(line, "NodeName")) is not None and _is_lost(line, since)
    ]


def _is_lost(line: str, since: float) -> bool:
    state = field_of(line, "State") or ""
    # Older versions mark a node that does not respond with a star, newer ones with a word.
    if "DOWN" in state.replace("*", "").split("+") or "NOT_RESPONDING" in state or "*" in state:
        return True
    booted = field_of(line, "BootTime")
    try:
        return booted is not None and datetime.fromisoformat(booted).timestamp() > since
    except ValueError:
        return False


def queue_seconds(job: str) -> float | None:
    """How long the job waited in the queue for this start."""
    text = _job_text(job) or ""
    submitted, started = field_of(text, "SubmitTime"), field_of(text, "StartTime")
    if submitted is None or started is None:
        return None
    try:
        return (datetime.fromisoformat(started) - datetime.fromisoformat(submitted)).total_seconds()
    except ValueError:
        return None


def is_running(job: str) -> bool:
    return (
        run_slurm_command("squeue", "--noheader", f"--jobs={job}", "--format=%T") or ""
    ).strip() == "RUNNING"


def queued_jobs(run: Path) -> list[QueuedJob] | None:
    """This user's pending and running jobs of the run folder; None when Slurm does not answer.

    Jobs are found by their script, which includes those submitted by hand, and through another path to the
    same folder.
    """
    text = run_slurm_command("squeue", "--noheader", "--me", "--format=%i|%T|%r|%S|%o")
    if text is None:
        return None
    jobs = []
    wanted = os.path.realpath(RunPaths(run).job_script)
    for line in text.splitlines():
        parts = line.split("|", 4)
        if len(parts) == 5 and parts[4].endswith(f"/{JOB_SCRIPT}") and os.path.realpath(parts[4]) == wanted:
            start = None if parts[3] == "N/A" else parts[3]
            jobs.append(QueuedJob(parts[0], parts[1], parts[2], start, parts[4]))
    return jobs


def submit(run: Path, options: Sequence[str] = ()) -> str:
    """Submit the run's job; returns the job id. Raises AlignkdError with sbatch's own message."""
    if not slurm_is_installed():
        raise UserError("sbatch is not on PATH: this is not a Slurm login node; use --backend local")
    script = RunPaths(run).job_script
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *options, str(script)],
            capture_output=True, text=True, timeout=120, env=clean_environment(),
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise AlignkdError(f"sbatch did not answer: {error}") from error
    if done.returncode != 0:
        raise AlignkdError(f"sbatch refused {script}:\n{done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]  # `--parsable` prints id[;cluster]


def signal_ranks(job: str, name: str) -> bool:
    """Signal the steps of a job but not its batch script, or a single step (``JOB.STEP``)."""
    return run_slurm_command("scancel", f"--signal={name}", job) is not None


def cancel_job(job: str) -> None:
    if run_slurm_command("scancel", job) is None:
        raise AlignkdError(f"scancel did not cancel job {job}")


def may_be_requeued(job: str) -> bool:
    return "Requeue=1" in (_job_text(job) or "").split()


def retarget_dependency(run: Path, job: str) -> None:
    """Make the stage that waits for ``run`` wait for ``job``: a resumed or chained job has a new id."""
    following = (read_json(RunPaths(run).next_stage) or {}).get("run")
    for waiting in (queued_jobs(Path(following)) or []) if following else []:
        if waiting.state == "PENDING":
            run_slurm_command("scontrol", "update", f"JobId={waiting.id}", f"Dependency=afterok:{job}")
