"""From a run folder to everything that training needs, the same on every rank."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

from alignkd.checkpoint.resume import find_checkpoint
from alignkd.checkpoint.shard_files import attach_shard_files
from alignkd.checkpoint.storage import Storage
from alignkd.config import load_run_config
from alignkd.config.schema import Config
from alignkd.data.encoder import SampleEncoder
from alignkd.data.held_out import HeldOut, held_out_data, held_out_loader
from alignkd.data.image_sample import image_sample
from alignkd.data.index import Index
from alignkd.data.loader import build_loader, build_sampler
from alignkd.distributed.ranks import Ranks
from alignkd.engine.accuracy import TaskAtEdges
from alignkd.engine.build import build_student_engine, build_teacher
from alignkd.engine.checks import check_run
from alignkd.engine.deepspeed_files import DeepSpeedFiles, read_deepspeed_files
from alignkd.engine.optimizer import describe_groups
from alignkd.engine.resume import resume_engine
from alignkd.engine.shared_index import shared_index
from alignkd.engine.shared_tower import reason_for_own_tower
from alignkd.engine.state import RunIdentity, TrainingState
from alignkd.errors import UserError
from alignkd.evaluate.asked_task import AskedTask, asked_task
from alignkd.evaluate.live_student import live_student
from alignkd.models.encoding import student_encoder
from alignkd.models.loading import fingerprint
from alignkd.run_folder.layout import layout_facts
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.progress import Progress
from alignkd.run_folder.save_times import lead_warning, measured_stop_seconds
from alignkd.teacher.cache_shards import CachedAnswers
from alignkd.teacher.cached import CachedTeacher
from alignkd.teacher.provider import Teacher, held_bytes
from alignkd.teacher_cache.check import check_samples, checked_manifest
from alignkd.teacher_cache.folder import Identity

log = logging.getLogger(__name__)


def prepare(run: Path, ranks: Ranks, progress: Progress, storage: Storage | None = None) -> TrainingState:
    """Read the run folder, index the data, build the engines and load the newest checkpoint. Collective.

    Raises UserError for whatever does not fit together. ``storage`` writes the conversion of a checkpoint.
    """
    config = load_run_config(RunPaths(run).config)
    files = read_deepspeed_files(run, config)
    check_run(config, ranks.world_size, files.accumulation)

    progress.report("indexing")
    encoder = student_encoder(config)
    index = shared_index(RunPaths(run).index, config.data, encoder, ranks, progress)
    log.info("%s", index.summary())
    held_out = _held_out(run, config, encoder, ranks, files.accumulation, progress)
    task = _task_at_edges(config, ranks)
    sampler = build_sampler(config, index)
    total_steps = sampler.total_steps(config.training.epochs, config.training.max_steps)

    progress.report("loading", total_steps=total_steps)
    cache = _cache_identity(config, index, ranks)
    engine, teacher = _build_models(config, files, ranks, cache)
    attach_shard_files(engine)
    found = find_checkpoint(run, ranks, config.checkpoint.keep_last)
    identity = RunIdentity(
        config=config.model_dump(mode="json", exclude={"stages"}),
        data=index.fingerprint,
        teacher=_teacher_fingerprint(teacher, ranks),
        images=_image_sample(config, index, ranks),
        layout=layout_facts(files.student, describe_groups(engine.module, config.training)),
    )
    identity = resume_engine(engine, run, found, identity, config, ranks, progress, storage or Storage())
    if teacher is not None:
        teacher.model.shares_tower = _shares_tower(config, teacher, engine, ranks)
    loader = build_loader(
        config,
        index,
        encoder,
        ranks.rank,
        ranks.world_size,
        files.accumulation,
        found.step or 0,
        pin_memory=ranks.device.type != "cpu",
        read_cache=None if cache is None else CachedAnswers(Path(str(config.teacher.cache)), cache),
    )
    _warn_of_a_late_signal(run, config, ranks)
    return TrainingState(
        run,
        config,
        ranks,
        engine,
        teacher,
        loader,
        found,
        total_steps,
        sampler,
        identity,
        held_out,
        task,
    )


def _held_out(
    run: Path, config: Config, encoder: SampleEncoder, ranks: Ranks, accumulation: int, progress: Progress
) -> HeldOut | None:
    if config.evaluation.every is None or not config.evaluation.sources:
        return None
    index = shared_index(RunPaths(run).held_out_index, held_out_data(config), encoder, ranks, progress)
    log.info("held out: %s", index.summary())
    if len(index) == 0:
        raise UserError("evaluation.sources: hold no usable sample")
    make_loader = partial(
        held_out_loader,
        config,
        index,
        encoder,
        ranks.rank,
        ranks.world_size,
        accumulation,
        pin_memory=ranks.device.type != "cpu",
    )
    return HeldOut(make_loader, index.fingerprint, min(config.evaluation.samples, len(index)))


def _task_at_edges(config: Config, ranks: Ranks) -> TaskAtEdges | None:
    if config.evaluation.every is None or config.evaluation.task is None:
        return None
    found: list[AskedTask] = []
    ranks.run_on_rank0(lambda: found.append(asked_task(config.evaluation)))
    asked: AskedTask = ranks.broadcast_object(found[0] if found else None)
    log.info("%d questions of %s for the accuracy", len(asked.questions), asked.name)
    return TaskAtEdges(asked, live_student(config))


def _cache_identity(config: Config, index: Index, ranks: Ranks) -> Identity | None:
    """Of the teacher's cache, if the run reads one. Raises UserError on all ranks when it does not fit."""
    if not config.distillation.enabled or config.teacher.placement != "cached":
        return None
    found: list[Identity] = []

    def read() -> None:
        identity = checked_manifest(config).identity
        check_samples(config, identity, len(index), index.entries_hash())
        found.append(identity)

    ranks.run_on_rank0(read)
    shared: Identity = ranks.broadcast_object(found[0] if found else None)
    return shared


def _build_models(
    config: Config, files: DeepSpeedFiles, ranks: Ranks, cache: Identity | None
) -> tuple[Any, Teacher | None]:
    # The student first: its ZeRO-3 context, if any, must be gone when the teacher's begins.
    engine, completed = build_student_engine(config, files.student, ranks)
    if completed:
        log.info("not from model.student: %s", ", ".join(completed))
    teacher = build_teacher(config, files.teacher, ranks, cache)
    if teacher is not None:
        held = held_bytes(teacher)
        log.info(
            "teacher on this rank: %.1f MB of weights, %.1f MB more in host memory, and %.1f MB for its "
            "whole head",
            held["shard"] / 1e6,
            held["host"] / 1e6,
            held["head"] / 1e6,
        )
    return engine, teacher


def _image_sample(config: Config, index: Index, ranks: Ranks) -> dict[str, str]:
    found: list[dict[str, str]] = []
    ranks.run_on_rank0(lambda: found.append(image_sample(config.data, index)))
    shared: dict[str, str] = ranks.broadcast_object(found[0] if found else None)
    return shared


def _teacher_fingerprint(teacher: Teacher | None, ranks: Ranks) -> str | None:
    if teacher is None:
        return None
    if isinstance(teacher, CachedTeacher):
        return teacher.weights
    shared: str = ranks.broadcast_object(fingerprint(teacher.model.model, hashing=ranks.is_first))
    return shared


def _shares_tower(config: Config, teacher: Teacher, engine: Any, ranks: Ranks) -> bool:
    reason: str | None = "distillation.share_vision_tower is false"
    if config.distillation.share_vision_tower:
        reason = reason_for_own_tower(teacher.model.model, engine.module.student, ranks)
    log.info("%s", f"two vision towers: {reason}" if reason else "one vision tower for teacher and student")
    return reason is None


def _warn_of_a_late_signal(run: Path, config: Config, ranks: Ranks) -> None:
    """In a Slurm job, by what the last save took."""
    if ranks.is_first and "SLURM_JOB_ID" in os.environ:
        warning = lead_warning(measured_stop_seconds(run), config.slurm.signal_seconds)
        if warning is not None:
            log.warning("%s", warning)
