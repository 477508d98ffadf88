"""Teacher and student engines from a run's configuration and its DeepSpeed files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
from deepspeed.runtime import compiler

from alignkd.config.schema import Config
from alignkd.distributed.nodes import node_group
from alignkd.distributed.ranks import Ranks
from alignkd.engine.optimizer import build_optimizer, parameter_groups
from alignkd.engine.student_step import StudentStep
from alignkd.models.adapters import load_adapters, seeded_adapters
from alignkd.models.building import DTYPES, BuildOptions
from alignkd.models.compiling import compile_layers
from alignkd.models.families.interface import VisionLanguageModel
from alignkd.models.loading import load_student, model_facts
from alignkd.models.lora import add_lora
from alignkd.teacher.cached import CachedTeacher
from alignkd.teacher.provider import ReplicatedTeacher, ShardedTeacher, Teacher
from alignkd.teacher_cache.folder import Identity


def build_teacher(
    config: Config, ds_teacher: dict[str, Any] | None, ranks: Ranks, cache: Identity | None = None
) -> Teacher | None:
    """The teacher, or None when distillation is off. Collective when it is sharded; ``ds_teacher`` is then
    its DeepSpeed configuration. ``cache``: what a cached one's cache is of."""
    folder = config.model.teacher
    if not config.distillation.enabled or folder is None:
        return None
    dtype = DTYPES[config.teacher.precision or config.training.precision]
    top_k = config.distillation.top_k
    if cache is not None:
        has_head = not config.teacher.caches_top_k
        return CachedTeacher(folder, top_k, BuildOptions(dtype, ranks.device), cache.weights, has_head)
    if config.teacher.placement == "replicated":
        teacher = ReplicatedTeacher(folder, top_k, BuildOptions(dtype, ranks.device))
        if config.training.compile_layers:
            compile_layers(teacher.model.model, ranks.device)
        return teacher
    assert ds_teacher is not None, "read_deepspeed_files reads it for a sharded teacher"
    group = node_group(ranks) if config.teacher.placement == "zero3_node" else None
    options = BuildOptions(dtype, ranks.device, ds_teacher, group)
    return ShardedTeacher(folder, top_k, options, keep_head=config.teacher.keep_head)


def build_student_engine(config: Config, ds_student: dict[str, Any], ranks: Ranks) -> tuple[Any, list[str]]:
    """The student's DeepSpeed engine (its ``module`` is a StudentStep), and the names of the tensors that
    model.student lacks. Collective."""
    dtype = DTYPES[config.training.precision]
    # A model that is not sharded is built on the host; the engine moves it.
    sharded = config.student.zero_stage == 3
    options = BuildOptions(dtype, ranks.device, ds_student) if sharded else BuildOptions(dtype)
    student, completed = load_student(config.model, config.training.seed, options)
    choose_trained_parts(student, config)
    if config.training.gradient_checkpointing:
        student.enable_gradient_checkpointing(config.training.checkpoint_every_nth_layer)
    if config.training.compile_layers and not sharded:
        compile_layers(student, ranks.device)
    adapters = None
    if config.distillation.enabled and config.model.teacher is not None:
        teacher = model_facts(config.model.teacher)
        source = config.model.adapters
        adapters = (
            seeded_adapters(teacher, student.facts, config.training.seed)
            if source is None
            else load_adapters(Path(source), teacher, student.facts)
        ).to(options.dtype)
    module = StudentStep(student, adapters, config.distillation)
    optimizer = build_optimizer(parameter_groups(module, config.training), ranks.device)
    _import_muon_uncompiled()
    engine = deepspeed.initialize(model=module, optimizer=optimizer, config=ds_student)[0]
    student.restore_buffers(ranks.device)
    engine.train()
    return engine, completed


def choose_trained_parts(student: VisionLanguageModel, config: Config) -> None:
    """Which parameters ask for gradients, with those that LoRA adds."""
    if config.training.train_vision_tower:
        student.unfreeze_vision_tower()
    if config.student.train is not None:
        student.freeze_all_but(config.student.train)
    if config.student.lora is not None:
        add_lora(student, config.student.lora, config.training.seed)


def _import_muon_uncompiled() -> None:
    """DeepSpeed imports its Muon to see whether the optimizer is one, which sets up torch.compile for three
    functions: a second of every rank's start. Ours is AdamW, which calls none of them."""
    compile_function = compiler.compile
    compiler.compile = lambda *_, **__: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = compile_function
