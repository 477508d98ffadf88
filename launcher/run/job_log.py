"""The log of a Slurm job, from its script, srun and slurmstepd: the failures that no rank can log."""

from __future__ import annotations

import re
from pathlib import Path

from alignkd.run_folder.atomic_files import read_json
from alignkd.run_folder.paths import RunPaths
from launcher.run.attempts import Attempt
from launcher.run.exit_codes import tail

_BEGIN = re.compile(r"alignkd: attempt (\d+) on ")
_ENDED_AT_ONCE = re.compile(r"alignkd: (stopped|cancelled) before it started")
# slurmstepd says "Detected 1 oom_kill event" (older versions: "oom-kill event(s)"), srun "Out Of Memory".
_OUT_OF_MEMORY = re.compile(r"(?:slurmstepd|srun): error: .*(?:oom[-_]kill|out of memory)", re.IGNORECASE)
_NODE = re.compile(r"srun: error: (\S+): tasks? \S+: Out Of Memory")
_NO_MODULE = re.compile(r"(\S+): .*No module named '?(?:launcher|alignkd)\b")
_BASH = re.compile(r"\S.*: line \d+: (.+)")  # SCRIPT: line 27: /x/python: No such file or directory
_SRUN = re.compile(r"(?:srun|slurmstepd): (?:error|fatal): (.+)")


def submitted_job(run: Path) -> str | None:
    """The job that was submitted last, unless it was cancelled while it was queued."""
    values = read_json(RunPaths(run).job) or {}
    return None if values.get("cancelled") else values.get("job")


def job_without_attempt(run: Path, history: list[Attempt]) -> str | None:
    """The submitted job, if it has not begun an attempt."""
    values = read_json(RunPaths(run).job) or {}
    began = len(history) > values.get("attempts_before", 0)
    return None if began else submitted_job(run)


def newest_job(run: Path) -> str | None:
    """The job whose log was written last; job.json does not know those that were submitted by hand."""
    logs = sorted(RunPaths(run).logs.glob("slurm-*.log"), key=lambda path: path.stat().st_mtime)
    return logs[-1].stem.removeprefix("slurm-") if logs else None


def log_of_job(run: Path, job: str) -> Path:
    """In the run folder, or the home folder for a job whose node did not see the run folder."""
    usual, other = RunPaths(run).job_log(job), Path.home() / f"alignkd-job-{job}.log"
    return other if other.exists() and not usual.exists() else usual


def job_lines(run: Path, job: str, attempt: int | None = None) -> list[str]:
    """What a job logged, at most 64 KiB (of ``attempt``, where a requeued job had several)."""
    lines = tail(log_of_job(run, job))
    starts = [(int(found[1]), index) for index, line in enumerate(lines) if (found := _BEGIN.match(line))]
    for place, (number, index) in enumerate(starts):
        if number == attempt:
            return lines[index : starts[place + 1][1] if place + 1 < len(starts) else len(lines)]
    return lines if attempt is None else []


def cause_of(lines: list[str]) -> str | None:
    """Why the ranks, or the script itself, could not run, from the lines of a job's log."""
    if (killed := out_of_memory(lines)) is not None:
        return killed
    for line in lines:
        if found := _NO_MODULE.search(line):
            return f"{found[1]} cannot import alignkd; see PYTHON in env.sh, or slurm.python"
        if found := _BASH.match(line):
            return f"the job script failed: {found[1]}"
    return next((f"srun: {found[1]}" for line in lines if (found := _SRUN.match(line))), None)


def out_of_memory(lines: list[str]) -> str | None:
    """A sentence, if Slurm killed ranks because a node's memory, or the job's share of it, was used up."""
    if not any(_OUT_OF_MEMORY.search(line) for line in lines):
        return None
    nodes = sorted({found[1] for line in lines if (found := _NODE.match(line))})
    where = f" on {', '.join(nodes)}" if nodes else ""
    return f"killed for lack of host memory{where}; request more with slurm.memory, or lower data.workers"


def ended_at_once(lines: list[str]) -> str | None:
    """ "stopped" or "cancelled", if a stop or a cancel came before the job could begin an attempt."""
    return next((found[1] for line in reversed(lines) if (found := _ENDED_AT_ONCE.match(line))), None)
