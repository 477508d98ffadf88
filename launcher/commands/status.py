"""What a run is doing, from its folder and, where Slurm answers, from the queue. Reads only."""

from __future__ import annotations

import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignkd.run_folder.atomic_files import read_json
from alignkd.run_folder.metrics import iter_rows, last_rows
from alignkd.run_folder.paths import RunPaths
from launcher.backends import backend_named
from launcher.backends.base import QueuedJob
from launcher.run.attempts import Attempt, Reason, last_sign, open_attempt, read_history
from launcher.run.exit_codes import failure_line
from launcher.run.lock import is_locked
from launcher.run.logs import log_of_failure
from launcher.run.manifest import Manifest, read_manifest

QUIET_SECONDS = 300.0  # a run that shows no sign of life for so long is worth a look
_ETA_ROWS = 50

_WAITS = {
    "None": "Slurm has not looked at it yet",
    "Priority": "jobs with a higher priority come first",
    "Resources": "not enough free nodes yet",
    "BeginTime": "Slurm holds a requeued job back for about two minutes",
    "Dependency": "waits for another job",
    "DependencyNeverSatisfied": "the job that it waits for has failed; cancel this one",
    "PartitionTimeLimit": "asks for more time than the partition gives",
    "PartitionNodeLimit": "asks for more nodes than the partition has",
    "PartitionDown": "the partition is down",
    "ReqNodeNotAvail": "a node that it needs is down or reserved",
    "JobHeldUser": "held; `scontrol release` lets it go",
    "JobHeldAdmin": "held by an administrator",
    "QOSMaxJobsPerUserLimit": "the limit of running jobs is reached",
}


@dataclass(frozen=True)
class RunState:
    """Seconds and Unix times. ``goodput`` is the share of the attempts' time that went into steps that were
    kept; ``lost_steps`` were made and must be made again."""

    run: str
    state: str
    detail: str
    backend: str
    nodes: int
    world_size: int
    job: str | None
    step: int
    total_steps: int | None
    loss: float | None
    seconds_left: float | None
    data_wait_share: float | None  # of a step, for which rank 0 waited for its samples; median of late steps
    padding_share: float | None  # of the positions that are computed; median of late steps
    attempts: int
    reasons: tuple[str, ...]  # why the attempts before this one ended
    lost_steps: int
    goodput: float | None
    queue_seconds: float
    start_estimate: str | None
    updated: float | None
    next: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect_run(run: Path, jobs: Sequence[QueuedJob] | None, now: float | None = None) -> RunState:
    """``jobs`` are the queued jobs of this run, None where Slurm does not answer. UserError: no run."""
    now = time.time() if now is None else now
    manifest = read_manifest(run)
    history, current = read_history(run), open_attempt(run)
    progress = read_json(RunPaths(run).progress) or {}
    result = read_json(RunPaths(run).result) or {}
    job = jobs[0] if jobs else None
    state, detail = _state(run, manifest, result, progress, jobs, history, current, now)
    rows = last_rows(RunPaths(run).metrics, _ETA_ROWS)
    step, total = progress.get("step", 0), progress.get("total_steps")
    step = max(step, rows[-1].get("step", 0)) if rows else step
    running = state == "running"
    return RunState(
        run=str(run),
        state=state,
        detail=detail,
        backend=manifest.backend,
        nodes=manifest.nodes,
        world_size=manifest.world_size,
        job=(job.id if job else None) or _job(manifest, current, history),
        step=step,
        total_steps=total,
        loss=rows[-1].get("loss") if rows else None,
        seconds_left=_seconds_left(rows, step, total) if running else None,
        data_wait_share=_median(rows, "data_wait_share"),
        padding_share=_median(rows, "padding_share"),
        attempts=len(history) + (current is not None),
        reasons=tuple(_why(attempt) for attempt in history),
        lost_steps=sum(attempt.lost_steps or 0 for attempt in history),
        goodput=_goodput(run, history, current, now if running else None),
        queue_seconds=sum(a.queue_seconds or 0.0 for a in [*history, *([current] if current else [])]),
        start_estimate=job.start if job and job.state == "PENDING" else None,
        updated=progress.get("updated"),
        # A rank has something to say only where one was started.
        next=_next(run, "stopped" if state == "failed" and history[-1].bad_nodes else state),
    )


def _job(manifest: Manifest, current: Attempt | None, history: list[Attempt]) -> str | None:
    newest = current or (history[-1] if history else None)
    return newest.job if newest is not None and backend_named(manifest.backend).has_queue else None


def _state(
    run: Path,
    manifest: Manifest,
    result: dict[str, Any],
    progress: dict[str, Any],
    jobs: Sequence[QueuedJob] | None,
    history: list[Attempt],
    current: Attempt | None,
    now: float,
) -> tuple[str, str]:
    """A word, and what there is to say about it."""
    if result.get("status") == "done":
        return "done", f"student: {run / 'student'}"
    if not backend_named(manifest.backend).has_queue:
        if is_locked(run):
            return "running", str(progress.get("phase", "starting"))
        if current is not None:
            return "stopped", "its launcher was killed, and the ranks with it"
        if history:
            return _ended(run, history[-1], manifest)
        # Earlier versions wrote no history of such runs.
        return ("stopped", "") if progress else ("not started", "")
    if jobs:
        if jobs[0].state == "PENDING":
            return "queued", _WAITS.get(jobs[0].reason, jobs[0].reason)
        if current is None:
            return "running", f"job {jobs[0].state.lower()}"
        return "running", _phase(progress, current, now)
    if current is not None:
        if jobs is None:
            return "running", _phase(progress, current, now) + "; Slurm does not answer here"
        return "lost", "its job is gone and left no word: a lost node, or a cancel without enough grace"
    if not history:
        return "not started", ""
    if history[-1].reason in (Reason.PREEMPTED, Reason.TIME_LIMIT, Reason.REQUEUED, Reason.NODE_LOST):
        why = _why(history[-1])
        if jobs is None:
            return "queued", f"{why}; Slurm does not answer here"
        return "stopped", f"{why}; and was not requeued"
    return _ended(run, history[-1], manifest)


def _ended(run: Path, last: Attempt, manifest: Manifest) -> tuple[str, str]:
    """Of a run whose last attempt has ended for good."""
    reason = last.reason or ""
    if reason in (Reason.CRASHED, Reason.BAD_INPUT):
        if last.bad_nodes:
            return "failed", f"{reason}: the run folder is not seen by {', '.join(last.bad_nodes)}"
        if last.failed_rank is None or last.exit_code is None:
            return "failed", reason
        log = log_of_failure(run, last.failed_rank)
        return "failed", f"{reason}: {failure_line(last.failed_rank, last.exit_code, log)}"
    # Only a queue ends a run by SIGTERM without its user.
    by_user = reason == Reason.TERMINATED and not backend_named(manifest.backend).has_queue
    stopped = reason == Reason.STOPPED or by_user
    return ("stopped" if stopped else reason), f"at step {last.saved_step}"


def _why(attempt: Attempt) -> str:
    reason = attempt.reason or "unknown"
    return f"{reason} ({', '.join(attempt.bad_nodes)})" if attempt.bad_nodes else reason


def _phase(progress: dict[str, Any], attempt: Attempt, now: float) -> str:
    updated = progress.get("updated")
    started = isinstance(updated, float | int) and updated >= attempt.start
    phase = str(progress["phase"]) if started and "phase" in progress else "starting"
    sign = updated if started and isinstance(updated, float | int) else attempt.start
    quiet = now - sign
    return phase if quiet < QUIET_SECONDS else f"{phase}; no sign of life for {quiet / 60:.0f} minutes"


def _median(rows: list[dict[str, Any]], name: str) -> float | None:
    """The first step of a start waits long, for the loader's processes: a mean would tell of nothing else."""
    values = [float(row[name]) for row in rows if isinstance(row.get(name), float | int)]
    return statistics.median(values) if values else None


def _seconds_left(rows: list[dict[str, Any]], step: int, total: int | None) -> float | None:
    seconds = [float(row["step_seconds"]) for row in rows if isinstance(row.get("step_seconds"), float | int)]
    if not seconds or total is None:
        return None
    return sum(seconds) / len(seconds) * (total - step)


def _goodput(run: Path, history: list[Attempt], current: Attempt | None, now: float | None) -> float | None:
    spent = sum(attempt.end - attempt.start for attempt in history if attempt.end is not None)
    if current is not None:
        spent += (last_sign(run, current) if now is None else now) - current.start
    if not RunPaths(run).attempts.exists() and current is None:
        return None
    kept = sum(row.get("step_seconds") or 0.0 for row in iter_rows(RunPaths(run).metrics))
    return min(1.0, kept / spent) if spent > 0 else None


def _next(run: Path, state: str) -> str:
    """A command to paste into a shell."""
    folder = shlex.quote(str(run))
    if state == "done":
        return f"alignkd export {folder} --out FOLDER"
    if state in ("running", "queued"):
        return f"alignkd logs {folder} -f" if state == "running" else f"alignkd status {folder}"
    if state == "failed":
        return f"alignkd logs {folder} --errors"
    return f"alignkd resume {folder}"
