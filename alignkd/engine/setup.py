"""From a run folder to everything that training needs, the same on every rank."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator

from alignkd.checkpoint.resume import Found, find_checkpoint, load_checkpoint, load_converted
from alignkd.checkpoint.storage import Storage, attach
from alignkd.config import load_run_config
from alignkd.config.schema import Config
from alignkd.data.loader import WindowLoader, build_loader, build_sampler
from alignkd.data.sampler import GlobalBatchSampler
from alignkd.data.tokenizer import SentencePieceTokenizer
from alignkd.engine.build import build_student_engine, build_teacher
from alignkd.engine.ranks import Ranks
from alignkd.engine.shared_index import shared_index
from alignkd.engine.shared_tower import reason_for_own_tower
from alignkd.errors import CheckpointError, UserError
from alignkd.models.agreement import check_agreement, student_folder, student_model_config
from alignkd.models.json_file import read_json
from alignkd.models.loading import fingerprint, frozen_fingerprint
from alignkd.run_folder.checkpoints import read_manifest, step_name
from alignkd.run_folder.drift import (
    allowed_changes,
    config_drift,
    conversion_problem,
    must_convert,
    saved_stage,
)
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.progress import Progress
from alignkd.teacher.provider import Teacher, held_bytes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFacts:
    """What must not change between a checkpoint and its resume; part of every checkpoint's manifest."""

    config: dict[str, Any]
    data: str  # fingerprint of data files, tokenizer and templates
    teacher: str | None  # fingerprint of its weights
    frozen: str = ""  # fingerprint of the student's frozen weights and buffers


@dataclass(frozen=True)
class Job:
    """One run on this rank, ready to train."""

    run: Path
    config: Config
    ranks: Ranks
    engine: Any  # DeepSpeed engine around a StudentStep
    teacher: Teacher | None
    loader: WindowLoader
    found: Found  # the checkpoint that was loaded, if any
    total_steps: int
    sampler: GlobalBatchSampler
    facts: RunFacts


def prepare(run: Path, ranks: Ranks, progress: Progress, storage: Storage | None = None) -> Job:
    """Collective. Raises UserError for whatever does not fit; nothing has been trained by then.

    ``storage`` writes what a conversion writes.
    """
    storage = storage or Storage()
    config = load_run_config(RunPaths(run).config)
    ds_student = _read_ds(RunPaths(run).student_deepspeed)
    ds_teacher = _read_ds(RunPaths(run).teacher_deepspeed) if _is_sharded(config) else None
    accumulation = _accumulation(RunPaths(run).student_deepspeed, ds_student)
    _check_split(config, ranks.world_size, accumulation)
    _check_precision(config)
    problems = check_agreement(config.model, config.distillation.top_k if config.distillation.enabled else 1)
    if problems:
        raise UserError("; ".join(problems))

    progress.report("indexing")
    model_facts = student_model_config(config.model)
    tokenizer = SentencePieceTokenizer.from_folder(student_folder(config.model))
    index = shared_index(
        RunPaths(run).index, config.data, tokenizer, model_facts.vision_tokens, ranks, progress
    )
    log.info("%s", index.summary())
    sampler = build_sampler(config, index)
    total_steps = sampler.total_steps(config.training.epochs, config.training.max_steps)

    progress.report("loading", total_steps=total_steps)
    # The student first: its ZeRO-3 context, if any, must be gone when the teacher's begins.
    engine, completed = build_student_engine(config, ds_student, ranks)
    if completed:
        log.info("not from model.student: %s", ", ".join(completed))
    teacher = build_teacher(config, ds_teacher, ranks)

    if teacher is not None:
        held = held_bytes(teacher)
        log.info(
            "teacher on this rank: %.1f MB of weights (%.1f MB more in host memory), and its head of %.1f MB "
            "during a step",
            held["shard"] / 1e6,
            held["host"] / 1e6,
            held["head"] / 1e6,
        )

    attach(engine)
    found = find_checkpoint(run, ranks, config.checkpoint.keep_last)
    for reason in found.refused:
        log.warning("passed over %s", reason)
    facts = RunFacts(
        config=config.model_dump(mode="json", exclude={"stages"}),
        data=index.fingerprint,
        teacher=None if teacher is None else ranks.broadcast_object(_teacher_fingerprint(teacher, ranks)),
    )
    manifest: dict[str, Any] = {}
    if found.step is not None:
        manifest = read_manifest(RunPaths(run).checkpoints / step_name(found.step))
        _check_conversion(run, manifest, config, ranks)
        _check_drift(run, manifest, facts)
        _load(engine, run, manifest, config, ranks, progress, storage)
        log.info("resumed at step %d", found.step)
    # After the load: at the same size it brings the frozen weights, after a conversion it leaves them alone.
    frozen = ranks.broadcast_object(frozen_fingerprint(engine.module, hashing=ranks.is_first))
    if manifest.get("frozen", frozen) != frozen:
        raise UserError(
            f"{run}: the student's frozen weights or buffers are not those of {step_name(manifest['step'])}: "
            "what lies at model.student or model.vision_tower has changed; put back what was there"
        )
    facts = replace(facts, frozen=frozen)
    if teacher is not None:
        teacher.model.shares_tower = _shares_tower(config, teacher, engine, ranks)
    loader = build_loader(
        config,
        index,
        tokenizer,
        model_facts,
        ranks.rank,
        ranks.world_size,
        accumulation,
        found.step or 0,
        pin_memory=ranks.device.type != "cpu",
    )
    return Job(run, config, ranks, engine, teacher, loader, found, total_steps, sampler, facts)


def _check_conversion(run: Path, manifest: dict[str, Any], config: Config, ranks: Ranks) -> None:
    stage = config.student.zero_stage
    problem = conversion_problem(manifest, ranks.world_size, stage)
    if problem is None and must_convert(manifest, ranks.world_size, stage) and "frozen" not in manifest:
        problem = (
            "it was saved by a version that did not record the student's frozen weights; resume on "
            f"{manifest['world_size']} ranks until the next checkpoint"
        )
    if problem:
        raise CheckpointError(f"{run}: cannot go on from {step_name(manifest['step'])}: {problem}")


def _load(
    engine: Any,
    run: Path,
    manifest: dict[str, Any],
    config: Config,
    ranks: Ranks,
    progress: Progress,
    storage: Storage,
) -> None:
    """Load a verified checkpoint in the way that fits the ranks."""
    step, stage = int(manifest["step"]), config.student.zero_stage
    if not must_convert(manifest, ranks.world_size, stage):
        load_checkpoint(engine, run, step, ranks)
        return
    log.info(
        "step-%d was written by %d ranks at ZeRO stage %d; converting it for %d at stage %d",
        *(step, manifest["world_size"], saved_stage(manifest), ranks.world_size, stage),
    )
    with progress.alive("converting"):
        load_converted(engine, run, step, ranks, config.training.seed, storage)


def _shares_tower(config: Config, teacher: Teacher, engine: Any, ranks: Ranks) -> bool:
    reason: str | None = "distillation.share_vision_tower is false"
    if config.distillation.share_vision_tower:
        reason = reason_for_own_tower(teacher.model.model, engine.module.student, ranks)
    log.info("%s", f"two vision towers: {reason}" if reason else "one vision tower for teacher and student")
    return reason is None


def _teacher_fingerprint(teacher: Teacher, ranks: Ranks) -> str:
    return fingerprint(teacher.model.model, hashing=ranks.is_first)


def _check_drift(run: Path, manifest: dict[str, Any], facts: RunFacts) -> None:
    problems = config_drift(manifest["config"], facts.config, allowed_changes(run))
    if manifest["data"] != facts.data:
        problems.append("the data, the tokenizer or the templates have changed")
    if manifest["teacher"] != facts.teacher:
        problems.append("the teacher's weights have changed")
    if problems:
        raise UserError(
            f"{run}: not the run of its checkpoint step-{manifest['step']}\n  " + "\n  ".join(problems) + "\n"
            "Undo the change, or accept a key with `alignkd resume RUN --allow-change KEY`."
        )


def _check_split(config: Config, world_size: int, accumulation: int) -> None:
    training = config.training
    whole, at_once = training.global_batch_size, training.micro_batch_size * world_size
    if training.tokens_per_micro_batch is not None:
        fits = accumulation == -(-whole // at_once)  # need not divide: the budget splits each step anew
    else:
        fits = accumulation * at_once == whole
    if not fits:
        raise UserError(
            f"training.global_batch_size {training.global_batch_size} is not micro_batch_size "
            f"{training.micro_batch_size} x {world_size} ranks x {accumulation} accumulation steps of "
            "ds/student.json; the run folder was made for another number of ranks"
        )


def _check_precision(config: Config) -> None:
    accelerator = get_accelerator()
    for key, precision in (
        ("training.precision", config.training.precision),
        ("teacher.precision", config.teacher.precision),
    ):
        if precision == "fp16" and not accelerator.is_fp16_supported():
            raise UserError(
                f"{key}: fp16 is not supported on {accelerator.device_name()}; valid here: bf16, fp32"
            )


def _is_sharded(config: Config) -> bool:
    return (
        config.distillation.enabled
        and config.model.teacher is not None
        and config.teacher.placement != "replicated"
    )


def _read_ds(path: Path) -> dict[str, Any]:
    """A DeepSpeed file that the launcher rendered, and that may have been edited by hand since."""
    if not path.exists():
        raise UserError(f"{path}: no such file; `alignkd launch` writes it into every run folder")
    return read_json(path)


def _accumulation(path: Path, ds_student: dict[str, Any]) -> int:
    steps = ds_student.get("gradient_accumulation_steps")
    if not isinstance(steps, int) or steps < 1:
        raise UserError(f"{path}: gradient_accumulation_steps must be a number from 1 on, found {steps!r}")
    return steps
