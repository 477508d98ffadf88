"""Which state a run is in, and why: one word and a detail, from its files and, with Slurm, from the queue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignkd.run_folder.atomic_files import read_json
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.progress import Snapshot, read_snapshot
from alignkd.run_folder.result import result_status
from launcher.backends import backend_named
from launcher.backends.base import QueuedJob
from launcher.commands.pending import pending_reason
from launcher.run.attempts import FAILURES, Attempt, Reason, open_attempt, read_history
from launcher.run.exit_codes import failure_line
from launcher.run.job_log import cause_of, ended_at_once, job_lines, job_without_attempt, out_of_memory
from launcher.run.lock import is_locked
from launcher.run.logs import log_of_failure
from launcher.run.manifest import Manifest, read_manifest
from launcher.run.restarts import GIVEN_UP_FOR_NODES, lost_too_often, since_submission

QUIET_SECONDS = 300.0  # a run without a sign of life for this long is worth a look


# Reasons after which a run restarts by itself
_RESTARTED = (Reason.PREEMPTED, Reason.TIME_LIMIT, Reason.REQUEUED, Reason.NODE_LOST, Reason.NODE_AT_FAULT)
# Reasons that nothing follows by itself. After a crash, say, only the queue tells whether the job restarts.
_FINAL = (Reason.STOPPED, Reason.CANCELLED, Reason.BAD_INPUT)


@dataclass(frozen=True)
class RunFiles:
    """What the files in a run folder say."""

    run: Path
    manifest: Manifest
    history: list[Attempt]
    current: Attempt | None  # the attempt that is open
    progress: Snapshot | None
    is_done: bool

    @property
    def has_queue(self) -> bool:
        return backend_named(self.manifest.backend).has_queue


def read_run(run: Path) -> RunFiles:
    """Raises UserError when ``run`` is not a run folder."""
    return RunFiles(
        run,
        read_manifest(run),
        read_history(run),
        open_attempt(run),
        read_snapshot(RunPaths(run).progress),
        result_status(run) == "done",
    )


def diagnose(files: RunFiles, jobs: Sequence[QueuedJob] | None, now: float) -> tuple[str, str]:
    """The state of a run in one word, and a detail, which may be empty.

    ``jobs`` are the run's live jobs, None where Slurm does not answer; ``now`` is a Unix time.
    """
    if files.is_done:
        return "done", f"student: {RunPaths(files.run).student}"
    return _in_queue(files, jobs, now) if files.has_queue else _without_queue(files, jobs)


def _without_queue(files: RunFiles, jobs: Sequence[QueuedJob] | None) -> tuple[str, str]:
    if is_locked(files.run) if jobs is None else bool(jobs):
        return "running", "starting" if files.progress is None else files.progress.phase
    if files.current is not None:
        return "stopped", "its launcher was killed, and the ranks with it"
    if files.history:
        return _ended(files)
    # Earlier versions wrote no history of such runs.
    return ("not started", "") if files.progress is None else ("stopped", "")


def _in_queue(files: RunFiles, jobs: Sequence[QueuedJob] | None, now: float) -> tuple[str, str]:
    if jobs:
        if jobs[0].state == "PENDING":
            return "queued", pending_reason(jobs[0].reason)
        if files.current is None:
            return "running", f"job {jobs[0].state.lower()}"
        return "running", _phase(files.progress, files.current, now)
    if jobs is None:
        return _without_an_answer(files, now)
    if files.current is not None:
        return "lost", (
            "its job vanished without recording an exit: a node was lost, or the job was cancelled with too "
            "little grace time"
        )
    if (job := job_without_attempt(files.run, files.history)) is not None:
        return _never_began(files, job)
    if not files.history:
        return "not started", ""
    last = files.history[-1]
    if last.reason == Reason.NODE_LOST and lost_too_often(since_submission(files.run)):
        return "failed", f"{reason_with_nodes(last)}; {GIVEN_UP_FOR_NODES}"
    if last.reason in _RESTARTED:
        return "stopped", f"{reason_with_nodes(last)}, not requeued"
    return _ended(files)


def _without_an_answer(files: RunFiles, now: float) -> tuple[str, str]:
    """From the files alone: what they do not prove is unknown, and not "no job"."""
    silence = "Slurm does not answer here"
    if files.current is not None:
        alive = files.progress is not None and now - files.progress.updated < QUIET_SECONDS
        return "running" if alive else "unknown", f"{_phase(files.progress, files.current, now)}; {silence}"
    if not files.history:
        return "unknown", f"no attempt has started yet; {silence}"
    last = files.history[-1]
    submitted = (read_json(RunPaths(files.run).job) or {}).get("submitted", 0.0)
    if last.reason in _FINAL and submitted <= (last.end or 0.0):
        return _ended(files)
    return "unknown", f"the last attempt: {reason_with_nodes(last)}; {silence}"


def _never_began(files: RunFiles, job: str) -> tuple[str, str]:
    """For a job that was submitted last, is in the queue no more, and has not begun an attempt."""
    lines = job_lines(files.run, job)
    if lines:
        stopped = ended_at_once(lines)
        why = f"job {job} ended before an attempt began: {cause_of(lines) or lines[-1]}"
        return (stopped, f"job {job}, before it started") if stopped else ("failed", why)
    end = backend_named(files.manifest.backend).end_of(job)
    if end is None:
        return "lost", f"job {job} left no log: its node does not see the run folder, or it was cancelled"
    if end.state == "CANCELLED":
        return "cancelled", f"job {job}, before it started"
    why = f": {end.comment}" if end.comment else ""
    return "failed", f"job {job} ended as {end.state} without a log{why}"


def _ended(files: RunFiles) -> tuple[str, str]:
    """For a run whose last attempt has ended for good."""
    last = files.history[-1]
    reason = last.reason or ""
    if reason in FAILURES:
        said = job_lines(files.run, last.job, last.number)
        if last.bad_nodes and reason == Reason.BAD_INPUT:
            unseen = f"a folder is not visible on {', '.join(last.bad_nodes)}"
            lines = (line.removeprefix("alignkd: ") for line in said if " cannot see " in line)
            return "failed", f"{reason}: {next(lines, unseen)}"
        if last.failed_rank is None or last.exit_code is None:
            cause = cause_of(said)
            return "failed", f"{reason}: {cause}" if cause else reason
        log = log_of_failure(files.run, last.failed_rank)
        why = failure_line(last.failed_rank, last.exit_code, log)
        return "failed", "; ".join([f"{reason}: {why}", *filter(None, [out_of_memory(said)])])
    at = f"at step {last.saved_step}"
    if reason in (Reason.CANCELLED, Reason.LOST):
        return reason, at
    # Without a queue only the user ends a run by SIGTERM.
    stopped = reason == Reason.STOPPED or (reason == Reason.TERMINATED and not files.has_queue)
    return "stopped", at if stopped else f"{reason}, {at}"


def reason_with_nodes(attempt: Attempt) -> str:
    """Why an attempt ended, with the nodes that are to blame."""
    reason = attempt.reason or "unknown"
    return f"{reason} ({', '.join(attempt.bad_nodes)})" if attempt.bad_nodes else reason


def _phase(progress: Snapshot | None, attempt: Attempt, now: float) -> str:
    if progress is None or progress.updated < attempt.start:  # written by an earlier attempt
        progress = Snapshot("starting", updated=attempt.start)
    quiet = now - progress.updated
    text = f"{progress.phase}; no sign of life for {quiet / 60:.0f} minutes"
    return progress.phase if quiet < QUIET_SECONDS else text
