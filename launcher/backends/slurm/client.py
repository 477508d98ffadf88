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

from alignkd.errors import AlignkdError
from alignkd.run_folder.paths import JOB_SCRIPT, RunPaths
from launcher.backends.base import QueuedJob

_SECONDS = 30  # until a command counts as not answering


def in_allocation() -> bool:
    """Is this the shell of a `salloc`? A job or a step is not: they have a process id within the job."""
    interactive = os.environ.get("SLURM_STEP_ID") == "4294967290"  # salloc with use_interactive_step
    return "SLURM_JOB_ID" in os.environ and ("SLURM_PROCID" not in os.environ or interactive)


def clean_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment without the variables of a surrounding job, which Slurm's commands read as options."""
    inherited = ("SLURM_", "SBATCH_", "SRUN_", "ALIGNKD_RUN", "ALIGNKD_ATTEMPT", "ALIGNKD_NODES")
    return {k: v for k, v in environment.items() if k == "SLURM_CONF" or not k.startswith(inherited)}


def run_slurm_command(*command: str) -> str | None:
    """What a Slurm command prints; None when it is not installed, fails or does not answer."""
    done = _run(command)
    return done.stdout if done is not None and done.returncode == 0 else None


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_SECONDS,
            env=clean_environment(),
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None


def slurm_is_installed() -> bool:
    return shutil.which("sbatch") is not None


def slurm_answers() -> bool:
    """Does a Slurm controller answer from here?"""
    return "UP" in (run_slurm_command("scontrol", "ping") or "")


def field_of(text: str, name: str) -> str | None:
    """A field of ``scontrol show``; None where it has no value."""
    # The first match: free text (the command, a comment) comes after all fields that are read here.
    found = re.search(rf"(?:^|\s){name}=(\S+)", text)
    return found[1] if found and found[1] not in ("None", "Unknown", "N/A", "(null)") else None


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


def running_jobs(jobs: Sequence[str]) -> set[str] | None:
    """Which of these jobs, of any user, are running; None when Slurm does not answer."""
    if not jobs:
        return set()
    done = _run(("squeue", "--noheader", f"--jobs={','.join(jobs)}", "--states=RUNNING", "--format=%i"))
    if done is None or (done.returncode != 0 and "Invalid job id" not in done.stderr):
        return None
    return set(done.stdout.split())  # empty for a single job that Slurm has forgotten: "Invalid job id"


def own_jobs() -> list[QueuedJob] | None:
    """This user's pending and running jobs; None when Slurm does not answer."""
    text = run_slurm_command("squeue", "--noheader", "--me", "--format=%i|%T|%r|%S|%o")
    if text is None:
        return None
    jobs = []
    for line in text.splitlines():
        parts = line.split("|", 4)
        if len(parts) == 5:
            start = None if parts[3] == "N/A" else parts[3]
            jobs.append(QueuedJob(parts[0], parts[1], parts[2], start, parts[4]))
    return jobs


def jobs_of(run: Path, jobs: Sequence[QueuedJob]) -> list[QueuedJob]:
    """The jobs of a run folder, which are found by their script.

    This includes those submitted by hand, and through another path to the same folder.
    """
    wanted = os.path.realpath(RunPaths(run).job_script)
    return [
        job
        for job in jobs
        if job.script.endswith(f"/{JOB_SCRIPT}") and os.path.realpath(job.script) == wanted
    ]


def queued_jobs(run: Path) -> list[QueuedJob] | None:
    """The pending and running jobs of one run folder; None when Slurm does not answer."""
    jobs = own_jobs()
    return None if jobs is None else jobs_of(run, jobs)


def signal_ranks(job: str, name: str) -> bool:
    """Signal the steps of a job but not its batch script, or a single step (``JOB.STEP``)."""
    return run_slurm_command("scancel", f"--signal={name}", job) is not None


def cancel_job(job: str) -> None:
    if run_slurm_command("scancel", job) is None:
        raise AlignkdError(f"scancel did not cancel job {job}")
