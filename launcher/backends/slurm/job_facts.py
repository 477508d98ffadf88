"""What Slurm knows about one job, from ``scontrol show job``."""

from __future__ import annotations

import os
import re
from datetime import datetime

from launcher.backends.base import JobEnd
from launcher.backends.slurm.client import field_of, run_slurm_command
from launcher.backends.slurm.lifecycle import JobState

_FINAL = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "TIMEOUT"),
)
_CLOCK_SECONDS = 1.0  # Slurm prints whole seconds


def _job_text(job: str) -> str | None:
    return run_slurm_command("scontrol", "show", "job", "--oneliner", job)


def job_state(job: str) -> JobState | None:
    """State of the job that this script belongs to; None when Slurm does not answer."""
    text = _job_text(job)
    if text is None:
        return None
    preempted = field_of(text, "PreemptTime") is not None
    mode, grace = _preemption(text) if preempted else ("", 0.0)
    notice = _seconds_between(text, "PreemptTime", "EndTime")
    return JobState(
        state=field_of(text, "JobState") or "RUNNING",
        reason=field_of(text, "Reason") or "None",
        preempted=preempted,
        requeued=int(field_of(text, "Restarts") or 0) > int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        requeueable=field_of(text, "Requeue") == "1",
        preempt_mode=mode,
        grace_over=notice is not None and notice + _CLOCK_SECONDS >= grace,
        excluded=field_of(text, "ExcNodeList"),
    )


def job_end(job: str) -> JobEnd | None:
    """Slurm forgets a job some minutes after its end (MinJobAge)."""
    text = _job_text(job)
    state = None if text is None else field_of(text, "JobState")
    if text is None or state not in _FINAL:
        return None
    comment = re.search(r"\sComment=(.*?)(?= \w+=|$)", text)  # free text, with spaces
    return JobEnd(state, comment[1].strip() if comment else None)


def _preemption(text: str) -> tuple[str, float]:
    """How Slurm preempts a job (REQUEUE, CANCEL, ...) and the seconds of grace: what the quality of service
    says, else the partition; ("", 0) where neither is known."""
    partition = run_slurm_command("scontrol", "show", "partition", "-o", field_of(text, "Partition") or "")
    mode = field_of(partition or "", "PreemptMode") or ""
    grace = float(field_of(partition or "", "GraceTime") or 0)
    if (qos := field_of(text, "QOS")) is not None:  # of clusters with an accounting database only
        shown = ("sacctmgr", "--noheader", "--parsable2", "show", "qos", qos, "format=PreemptMode,GraceTime")
        own_mode, _, own_grace = (run_slurm_command(*shown) or "").strip().partition("|")
        mode = mode if own_mode in ("", "cluster") else own_mode.upper()
        grace = max(grace, _clock_seconds(own_grace))
    return mode, grace


def _clock_seconds(text: str) -> float:
    """``[days-]hours:minutes:seconds``; 0 for anything else."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if found is None:
        return 0.0
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds


def _seconds_between(text: str, first: str, second: str) -> float | None:
    start, end = field_of(text, first), field_of(text, second)
    if start is None or end is None:
        return None
    try:
        return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
    except ValueError:
        return None


def queue_seconds(job: str) -> float | None:
    """How long the job waited in the queue for this start."""
    return _seconds_between(_job_text(job) or "", "SubmitTime", "StartTime")


def may_be_requeued(job: str) -> bool | None:
    """None when Slurm does not answer."""
    text = _job_text(job)
    return None if text is None else field_of(text, "Requeue") == "1"
