"""The training loop: optimizer steps, metrics, checkpoints, and a stop that all ranks agree on."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from alignkd.checkpoint.export import export_adapters, export_engine
from alignkd.checkpoint.model_card import model_card
from alignkd.checkpoint.save import CheckpointSaver
from alignkd.checkpoint.storage import Storage
from alignkd.data.batch import Batch
from alignkd.engine.metrics import Metrics
from alignkd.engine.optimizer import RATE_NAMES, base_rates, schedule_factor, set_learning_rates
from alignkd.engine.optimizer_step import all_reduce_step_info, peak_memory_bytes, run_optimizer_step
from alignkd.engine.setup import Job
from alignkd.engine.signals import StopRequest, exit_code
from alignkd.engine.skipped_steps import SkippedSteps
from alignkd.engine.stopwatch import Stopwatch
from alignkd.errors import EXIT_OK, AlignkdError, FileSystemError, TakenOverError, TrainingError
from alignkd.run_folder.atomic_files import write_text_atomic
from alignkd.run_folder.metrics import iter_rows
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.progress import Progress
from alignkd.run_folder.save_times import lead_warning, measured_stop_seconds

log = logging.getLogger(__name__)


def train(
    job: Job,
    stop: StopRequest,
    progress: Progress,
    storage: Storage | None = None,
    is_writer: Callable[[], bool] = lambda: True,
) -> int:
    """Train to the last step, or to the edge after a stop signal; returns the exit code. Collective.

    ``is_writer`` is asked on rank 0 before anything is committed.
    """
    metrics = Metrics(RunPaths(job.run).metrics, job.config.distillation, job.ranks)
    job.ranks.while_first_works(lambda: metrics.cut_after(job.found.step or 0))
    saver = CheckpointSaver(
        job.run, job.config.checkpoint, job.ranks, storage or Storage(), job.found, metrics.sync, is_writer
    )
    try:
        return _train(job, stop, progress, metrics, saver)
    except TakenOverError:
        raise
    except AlignkdError:
        # All ranks come here from the same step (a loss that is not finite, say, or one rank's bad sample).
        # A save of an earlier one that is still being written is as good as any, and the newest.
        with contextlib.suppress(TrainingError):
            saver.finish()
        raise
    finally:
        job.loader.close()  # it waits for its workers: not before a save for which the time may be short
        saver.close()


def _train(job: Job, stop: StopRequest, progress: Progress, metrics: Metrics, saver: CheckpointSaver) -> int:
    started = time.monotonic()
    skipped = SkippedSteps(job.config.training.max_skipped_steps, int(job.engine.skipped_steps))
    step = job.found.step or 0
    if job.ranks.is_first and "SLURM_JOB_ID" in os.environ:
        warning = lead_warning(measured_stop_seconds(job.run), job.config.slurm.signal_seconds)
        if warning is not None:
            log.warning("%s", warning)
    code = EXIT_OK
    sizes = job.engine.module.sizes()
    teacher_watch = Stopwatch()
    windows = iter(job.loader)
    slowest = 0.0  # step since the last save, seconds
    edge = time.perf_counter()
    while step < job.total_steps:
        asked = time.perf_counter()
        window, problem = _next_window(windows)
        waited = time.perf_counter() - asked  # of the host, which no device holds up here
        # Who has lost the run stops at once: it would go on for nothing until the next save, and add rows to
        # the other's metrics.
        problem = saver.taken_over or problem
        facts = all_reduce_step_info(window, sizes, stop, job.ranks, saver.written, problem)
        if facts.usr1 or facts.term:
            code = exit_code(facts.usr1, facts.term)
            break
        if saver.in_flight and facts.written:
            held = time.perf_counter()
            saver.finish()
            edge += time.perf_counter() - held  # not a part of the step
        factor = schedule_factor(step, job.total_steps, job.config.training.warmup_ratio)
        set_learning_rates(job.engine.optimizer, factor)
        sums = run_optimizer_step(
            job.engine,
            job.teacher,
            window,
            facts,
            job.config.distillation,
            job.ranks,
            teacher_watch,
            job.config.teacher.lookahead,
        )
        step += 1
        applied = job.engine.was_step_applied()
        skipped.count(applied, step)
        now = time.perf_counter()
        slowest = max(slowest, now - edge)
        row = {**_known_at_once(job, step, factor), "skipped_steps": skipped.total}
        row["data_wait_share"] = min(waited / max(now - edge, 1e-9), 1.0)
        metrics.add(row, sums, facts, teacher_watch.take(), now - edge, applied=applied)
        edge = now
        if metrics.last is not None:
            shown = {name: metrics.last[name] for name in ("loss", "samples_per_second", "data_wait_share")}
            shown |= {"saved_step": saver.newest, "save_held_seconds": saver.totals.held_seconds}
            progress.report("training", step=step, total_steps=job.total_steps, **shown)
        if step % job.config.checkpoint.every == 0 and step < job.total_steps:
            _save(job, saver, step, metrics, progress, slowest, wait=False)
            slowest, edge = 0.0, time.perf_counter()
    metrics.flush()
    # A save in flight is the first to be had when the time runs out: it is committed before a newer one.
    saver.finish()
    if step > saver.newest:
        _save(job, saver, step, metrics, progress, slowest, wait=True)
    if step > saver.newest and code != EXIT_OK:
        raise TrainingError(
            f"stopped at step {step}, but it could not be saved; step {saver.newest} is the newest"
        )
    status = "done" if code == EXIT_OK else "stopped"
    result = {
        "status": status,
        "step": step,
        "total_steps": job.total_steps,
        "saves": asdict(saver.totals),
        "peak_memory_bytes_per_rank": job.ranks.gather_objects(peak_memory_bytes()),
    }
    if code == EXIT_OK:
        progress.report("exporting", step=step, total_steps=job.total_steps)
        saver.stop_unless_writer()  # the other one exports, too
        _finish(job, result, metrics, saver.newest, started)
    elif job.ranks.is_first:
        with contextlib.suppress(OSError):  # it is saved, and the exit code says what comes next
            _write_result(job.run, result, started)
    progress.report(status, step=step, total_steps=job.total_steps)
    return code


def _next_window(windows: Iterator[list[Batch]]) -> tuple[list[Batch], AlignkdError | None]:
    """The window, or why this rank has none. The other ranks would wait for one that just left."""
    try:
        return next(windows), None
    except AlignkdError as error:
        return [], error
    except Exception as error:  # of a worker that ended by itself, say
        log.exception("the data loader failed")
        return [], TrainingError(f"the data loader failed: {type(error).__name__}: {error}")


def _finish(job: Job, result: dict[str, Any], metrics: Metrics, saved: int, started: float) -> None:
    """The adapters, the student, and last the result, which says that all is there. Collective."""

    def write_result() -> None:
        metrics.sync()
        _write_result(job.run, result, started)

    try:
        export_adapters(job.engine, job.run, job.ranks)
        card = model_card(job.run, result["step"], asdict(job.facts), _versions())
        export_engine(job.engine, job.config, RunPaths(job.run).student, job.ranks, card)
        job.ranks.while_first_works(write_result)
    except FileSystemError as error:
        raise FileSystemError(
            f"{job.run}: all {job.total_steps} steps are done, but their result could not be written: "
            f"{error}\nMake room, or mend what it names; "
            f"`alignkd resume {job.run}` goes on from step {saved}."
        ) from error


def _known_at_once(job: Job, step: int, factor: float) -> dict[str, Any]:
    """The part of a metrics row that needs no device."""
    rates = base_rates(job.config.training)
    samples = job.sampler.samples_before(step)
    return {
        "step": step,
        "total_steps": job.total_steps,
        "epoch": samples / job.sampler.samples_per_epoch,
        "samples": samples,
        **{name: rates[name] * factor for name in RATE_NAMES},
    }


def _save(
    job: Job,
    saver: CheckpointSaver,
    step: int,
    metrics: Metrics,
    progress: Progress,
    slowest_step: float,
    *,
    wait: bool,
) -> None:
    # The last row is finished first, so that a non-finite loss stops the run before it is saved.
    metrics.flush()
    progress.report("saving", step=step, total_steps=job.total_steps)
    facts = {
        **asdict(job.facts),
        "samples": job.sampler.samples_before(step),
        "step_seconds": slowest_step,
        "versions": _versions(),
    }
    saver.save(job.engine, step, facts, wait=wait)


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("alignkd", "torch", "deepspeed", "transformers")}


def _write_result(run: Path, result: dict[str, Any], started: float) -> None:
    """Raises OSError. ``started``: by the monotonic clock."""
    rows = list(iter_rows(RunPaths(run).metrics))
    result = {
        **result,
        "first": rows[0] if rows else None,
        "last": rows[-1] if rows else None,
        "seconds": time.monotonic() - started,
    }
    write_text_atomic(RunPaths(run).result, json.dumps(result, indent=1) + "\n")
