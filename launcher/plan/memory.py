"""Memory of one rank, part by part, from a configuration and the DeepSpeed files that it is rendered to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from alignkd.config import Config
from launcher.plan import activations
from launcher.plan.sizes import ModelSizes, RunSizes
from launcher.plan.workload import Cluster, Workload
from launcher.render import student_config, teacher_config

Phase = Literal["always", "teacher", "student", "optimizer"]
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FP32 = 4


@dataclass(frozen=True)
class Part:
    """``phase``: when it is there; parts of different phases but ``always`` are never there together."""

    name: str
    bytes: int
    phase: Phase = "always"
    in_host_memory: bool = False


@dataclass(frozen=True)
class Memory:
    parts: tuple[Part, ...]

    def phase_bytes(self, phase: Phase) -> int:
        return sum(part.bytes for part in self.parts if part.phase == phase and not part.in_host_memory)

    @property
    def peak_phase(self) -> Phase:
        phases: tuple[Phase, ...] = ("teacher", "student", "optimizer")
        return max(phases, key=self.phase_bytes)

    @property
    def peak(self) -> int:
        """Tensors on the device of one rank at the worst moment of an optimizer step."""
        return self.phase_bytes("always") + self.phase_bytes(self.peak_phase)

    @property
    def host(self) -> int:
        return sum(part.bytes for part in self.parts if part.in_host_memory)


def run_memory(config: Config, sizes: RunSizes, work: Workload, cluster: Cluster) -> Memory:
    parts = _teacher_parts(config, sizes, work, cluster)
    parts += _state_parts(config, sizes, cluster)
    parts += _step_parts(config, sizes, work, cluster)
    return Memory(tuple(part for part in parts if part.bytes))


def shard_ranks(config: Config, cluster: Cluster) -> int:
    """Ranks over which the teacher's weights are split."""
    placement = config.teacher.placement
    return {"replicated": 1, "zero3_node": cluster.gpus_per_node}.get(placement, cluster.ranks)


def sharded(tensors: Iterable[int], ranks: int) -> int:
    """Elements on one rank: ZeRO-3 fills every tensor up to a multiple of the ranks."""
    return sum(-(-size // ranks) for size in tensors)


def teacher_size(config: Config) -> int:
    """Bytes of an element of the teacher."""
    return BYTES[config.teacher.precision or config.training.precision]


def _teacher_parts(config: Config, sizes: RunSizes, work: Workload, cluster: Cluster) -> list[Part]:
    teacher = sizes.teacher
    if teacher is None:
        return []
    size, ds = teacher_size(config), teacher_config(config)
    targets = activations.target_bytes(teacher.config, work, size) * work.window
    parts = [
        Part("teacher's targets", targets, "student"),
        Part("teacher's targets", targets, "teacher"),
        Part("work of a layer", activations.forward_workspace(teacher.config, work, size), "teacher"),
    ]
    if ds is None:
        return [Part("teacher, whole", teacher.count() * size), *parts]
    zero = ds["zero_optimization"]
    shard = sharded(teacher.tensors.values(), shard_ranks(config, cluster)) * size
    return [
        Part("teacher shard", shard, in_host_memory="offload_param" in zero),
        Part("teacher's small tensors", sum(resident(teacher, zero).values()) * size),
        Part("teacher's head, for a step", teacher.count("head.") * size),
        *parts,
        Part("teacher's gathered layers", gathered(teacher, zero) * size, "teacher"),
    ]


def resident(model: ModelSizes, zero: dict[str, Any]) -> dict[str, int]:
    """Tensors so small that ZeRO-3 keeps them whole on top of their shards, from their first use on."""
    threshold = zero["stage3_param_persistence_threshold"]
    return {name: size for name, size in model.tensors.items() if size <= threshold and model.is_used(name)}


def gathered(model: ModelSizes, zero: dict[str, Any]) -> int:
    """Elements that ZeRO-3 holds whole at once: it prefetches up to its limit on live parameters."""
    whole = sum(
        size for name, size in model.tensors.items() if size > zero["stage3_param_persistence_threshold"]
    )
    largest = max(model.count("language_model.layers.0."), model.count("language_model.embed_tokens."))
    limit = max(zero["stage3_max_live_parameters"], largest) + zero["stage3_prefetch_bucket_size"]
    return int(min(whole, limit))


def _state_parts(config: Config, sizes: RunSizes, cluster: Cluster) -> list[Part]:
    """Weights, gradients and optimizer states, as DeepSpeed 0.19.8 keeps them (measured)."""
    stage, ranks = config.student.zero_stage, cluster.ranks
    size, half = BYTES[config.training.precision], config.training.precision != "fp32"
    trainable, frozen = sizes.trainable(config), sizes.frozen(config)
    P = sum(trainable.values())
    own = sharded(trainable.values(), ranks) if stage == 3 else -(-P // ranks)
    if stage == 0:
        own = P
    offload = config.student.offload
    weights = (own + sharded(frozen.values(), ranks)) if stage == 3 else P + sum(frozen.values())
    # Stages 0 and 1 keep whole gradients in the model's dtype, 2 and 3 their part in fp32.
    gradients = P * size if stage < 2 else own * FP32
    masters = own * FP32 if half or stage > 0 else 0  # ZeRO copies even fp32 weights
    return [
        Part("student's weights", weights * size, in_host_memory=offload and stage == 3),
        Part("gradients", gradients, in_host_memory=offload and stage >= 2),
        Part("fp32 weights", masters, in_host_memory=offload),
        Part("AdamW's two moments", 2 * own * FP32, in_host_memory=offload),
        Part("fp32 gradients", own * FP32 if masters and not offload else 0, "optimizer"),
    ]


def _step_parts(config: Config, sizes: RunSizes, work: Workload, cluster: Cluster) -> list[Part]:
    student, training = sizes.student, config.training
    size, checkpointing = BYTES[training.precision], training.gradient_checkpointing
    zero = student_config(config, cluster.ranks)["zero_optimization"]
    stage, bucket = zero["stage"], zero.get("reduce_bucket_size", 0)
    kept = activations.kept_bytes(student.config, work, size, checkpointing=checkpointing)
    workspace = max(
        activations.layer_workspace(student.config, work, size, checkpointing=checkpointing),
        activations.logits_workspace(student.config, work),
        activations.block_workspace(student.config, work),
    )
    parts = [
        Part("activations for backward", kept, "student"),
        Part("work of a layer or chunk", workspace, "student"),
    ]
    if stage in (1, 2):  # two, so that one is filled while the other is sent
        parts.append(Part("gradient buckets", 2 * bucket * size, "student"))
    if stage == 3:
        parts += [
            Part("gradient bucket", bucket * size),
            Part("student's small tensors", sum(resident(student, zero).values()) * size),
            Part("student's gathered layers", gathered(student, zero) * size, "student"),
        ]
    return parts
