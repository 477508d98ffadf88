"""``alignkd status`` and ``alignkd list``: everything there is to know about a run. Reads only."""

from __future__ import annotations

import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignkd.errors import UserError
from alignkd.run_folder.best import Best, best_of_run
from alignkd.run_folder.metrics import ACCURACY_COLUMN, Row, iter_rows, last_rows, weights_of_row
from alignkd.run_folder.paths import RunPaths
from launcher.backends import backend_named
from launcher.backends.base import QueuedJob
from launcher.commands.diagnosis import RunFiles, diagnose, read_run, reason_with_nodes
from launcher.commands.states import State
from launcher.run.attempts import Attempt, Reason, last_sign
from launcher.run.job_log import job_without_attempt
from launcher.run.manifest import read_manifest
from launcher.run.stragglers import find_stragglers

_LATE_ROWS = 50  # the metrics rows that the time left, and the shares below, are taken from


@dataclass(frozen=True)
class RunState:
    """Times are in seconds; ``updated`` is a Unix time."""

    run: str
    state: State
    detail: str
    backend: str
    nodes: int
    world_size: int
    job: str | None
    step: int
    total_steps: int | None
    loss: float | None
    weights: dict[str, float] | None  # of the loss terms in that step, where distillation.balance moves them
    seconds_left: float | None
    data_wait_share: float | None  # share of a step that rank 0 waited for samples; median of late steps
    padding_share: float | None  # share of the computed positions; median of late steps
    slow_ranks: tuple[str, ...]  # that keep the others waiting, the slowest first
    attempts: int
    reasons: tuple[str, ...]  # why the closed attempts ended
    lost_steps: int  # computed, but not saved: computed again
    goodput: float | None  # share of the attempts' time that was spent on steps that were kept
    best_step: int | None  # the checkpoint with the best value of evaluation.best
    best_value: float | None
    best_by: str | None  # the name of the value, such as "loss"
    accuracy_step: int | None  # of the newest row with the accuracy of evaluation.task
    accuracy: float | None
    queue_seconds: float
    start_estimate: str | None
    updated: float | None
    next: str  # a command

    @property
    def best(self) -> Best | None:
        if self.best_step is None or self.best_value is None or self.best_by is None:
            return None
        return Best(self.best_step, self.best_value, self.best_by)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def current_state(run: Path) -> RunState:
    """Asks the queue as well, for a run that has one. Raises UserError when ``run`` is not a run folder."""
    return inspect_run(run, backend_named(read_manifest(run).backend).live_jobs(run))


def all_states(folder: Path) -> tuple[list[RunState], list[str]]:
    """The states of all runs in ``folder``, and why others were left out (a manifest of another tool, say).

    Raises UserError when there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the parent of the run folders")
    by_backend: dict[str, list[Path]] = {}
    states, problems = [], []
    for manifest in sorted(folder.glob(str(RunPaths(Path("*")).manifest))):
        try:
            by_backend.setdefault(read_manifest(manifest.parent).backend, []).append(manifest.parent)
        except UserError as error:
            problems.append(str(error))
    for name, runs in by_backend.items():
        try:
            jobs = backend_named(name).live_jobs_of(runs)
        except UserError as error:  # a back end of another version
            problems += [f"{run}: {error}" for run in runs]
            continue
        states += [inspect_run(run, found) for run, found in zip(runs, jobs, strict=True)]
    return sorted(states, key=lambda state: state.run), problems


def holds_runs(folder: Path) -> bool:
    """Is this the parent of run folders, and not one itself?"""
    paths = RunPaths(folder)
    if paths.manifest.exists() or paths.config.exists() or not folder.is_dir():
        return False
    return not any(folder.iterdir()) or any(folder.glob(str(RunPaths(Path("*")).manifest)))


def inspect_run(run: Path, jobs: Sequence[QueuedJob] | None, now: float | None = None) -> RunState:
    """``jobs`` are the live jobs of this run, None where Slurm does not answer.

    Raises UserError when ``run`` is not a run folder.
    """
    now = time.time() if now is None else now
    files = read_run(run)
    state, detail = diagnose(files, jobs, now)
    job = jobs[0] if jobs else None
    rows = last_rows(RunPaths(run).metrics, _LATE_ROWS)
    progress = files.progress
    step, total = (0, None) if progress is None else (progress.step, progress.total_steps)
    step = max(step, rows[-1].get("step", 0)) if rows else step
    running = state == "running"
    attempts = [*files.history, *([files.current] if files.current else [])]
    best, (kept, accuracy) = _best(run), _of_all_rows(run)
    return RunState(
        run=str(run),
        state=State(state),
        detail=detail,
        backend=files.manifest.backend,
        nodes=files.manifest.nodes,
        world_size=files.manifest.world_size,
        job=(job.id if job else None) or _last_job(files, attempts),
        step=step,
        total_steps=total,
        loss=rows[-1].get("loss") if rows else None,
        weights=(weights_of_row(rows[-1]) or None) if rows else None,
        seconds_left=_seconds_left(rows, step, total) if running else None,
        data_wait_share=_median(rows, "data_wait_share"),
        padding_share=_median(rows, "padding_share"),
        slow_ranks=_slow_ranks(files) if running else (),
        attempts=len(attempts),
        reasons=tuple(reason_with_nodes(attempt) for attempt in files.history),
        lost_steps=sum(attempt.lost_steps or 0 for attempt in attempts),
        goodput=_goodput(files, kept, now if running else None),
        best_step=None if best is None else best.step,
        best_value=None if best is None else best.value,
        best_by=None if best is None else best.by,
        accuracy_step=None if accuracy is None else accuracy[0],
        accuracy=None if accuracy is None else accuracy[1],
        queue_seconds=sum(attempt.queue_seconds or 0.0 for attempt in attempts),
        start_estimate=job.start if job and job.state == "PENDING" else None,
        updated=None if progress is None else progress.updated,
        next=_next(run, "stopped" if state == "failed" and _started_no_rank(files) else state),
    )


def _best(run: Path) -> Best | None:
    """None also where it cannot be told now. Only runs that evaluate have their manifests read."""
    if not (RunPaths(run).held_out_index.exists() or RunPaths(run).answers.exists()):
        return None
    try:
        return best_of_run(run)
    except (OSError, UserError):
        return None


def _of_all_rows(run: Path) -> tuple[float, tuple[int, float] | None]:
    """Seconds of the steps that were kept, and step and value of the newest accuracy. In one pass: a long run
    has many rows."""
    seconds, accuracy, asked = 0.0, None, RunPaths(run).answers.exists()
    for row in iter_rows(RunPaths(run).metrics):
        seconds += row.get("step_seconds") or 0.0
        if asked and row.get(ACCURACY_COLUMN) is not None:
            accuracy = row["step"], row[ACCURACY_COLUMN]
    return seconds, accuracy


def _last_job(files: RunFiles, attempts: list[Attempt]) -> str | None:
    if not files.has_queue:
        return None
    waiting = None if files.current else job_without_attempt(files.run, files.history)
    return waiting or (attempts[-1].job if attempts else None)


def _started_no_rank(files: RunFiles) -> bool:
    """Did some nodes not see a folder? Then there is nothing in the logs."""
    last = files.history[-1] if files.history else None
    return last is not None and last.reason == Reason.BAD_INPUT and bool(last.bad_nodes)


def _slow_ranks(files: RunFiles) -> tuple[str, ...]:
    found = find_stragglers(files.run, files.manifest.world_size)
    per_node = files.manifest.gpus_per_node
    return tuple(f"rank {one.rank} (node {one.rank // per_node}): {one.times:.3g} x" for one in found)


def _median(rows: list[Row], name: str) -> float | None:
    """Not a mean: the first step of a start waits long, for the processes of the loader."""
    values = [float(row[name]) for row in rows if isinstance(row.get(name), float | int)]
    return statistics.median(values) if values else None


def _seconds_left(rows: list[Row], step: int, total: int | None) -> float | None:
    seconds = [float(row["step_seconds"]) for row in rows if isinstance(row.get("step_seconds"), float | int)]
    return statistics.fmean(seconds) * (total - step) if seconds and total is not None else None


def _goodput(files: RunFiles, kept: float, now: float | None) -> float | None:
    """``kept``: seconds of the steps that were kept. ``now`` is None for a run that is not running: its open
    attempt lasted until the last sign of life."""
    spent = sum(attempt.end - attempt.start for attempt in files.history if attempt.end is not None)
    if files.current is not None:
        spent += (last_sign(files.run, files.current) if now is None else now) - files.current.start
    if spent <= 0:
        return None
    return min(1.0, kept / spent)


def _next(run: Path, state: str) -> str:
    """A command that can be pasted into a shell."""
    folder = shlex.quote(str(run))
    commands = {
        "done": f"alignkd export {folder} --out FOLDER",
        "running": f"alignkd logs {folder} -f",
        "queued": f"alignkd status {folder}",
        "unknown": f"alignkd status {folder}",
        "failed": f"alignkd logs {folder} --errors",
    }
    return commands.get(state, f"alignkd resume {folder}")
