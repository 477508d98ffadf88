"""What ZeRO-3 and the teacher's placement leave on one rank, from the run's DeepSpeed files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from alignkd.config import Config
from launcher.plan.sizes import RunSizes
from launcher.plan.tensors import ModelSizes
from launcher.plan.workload import Cluster
from launcher.render.deepspeed import student_config, teacher_config

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Rendered:
    """The ``zero_optimization`` sections of the run's DeepSpeed files."""

    student: dict[str, Any]
    teacher: dict[str, Any] | None  # None: no teacher, or a replicated one


def rendered(config: Config, cluster: Cluster) -> Rendered:
    teacher = teacher_config(config)
    return Rendered(
        student_config(config, cluster.ranks)["zero_optimization"],
        None if teacher is None else teacher["zero_optimization"],
    )


def student_size(config: Config) -> int:
    """Bytes per element of the student."""
    return BYTES[config.training.precision]


def teacher_size(config: Config) -> int:
    return BYTES[config.teacher.precision or config.training.precision]


def top_k_bytes(config: Config) -> int:
    """Of a position whose top-k tokens are cached: their numbers in int32, and log-probabilities of each and
    of all other tokens together in fp16."""
    top_k = config.teacher.cache_top_k
    return 4 * top_k + 2 * (top_k + 1)


def answer_bytes(config: Config, width: int) -> int:
    """Of a position, on the device: what the logit term compares with, of a teacher of this width."""
    return top_k_bytes(config) if config.teacher.caches_top_k else width * teacher_size(config)


def shares_tower(config: Config, sizes: RunSizes) -> bool:
    """Whether one vision tower can serve both models, judging by configurations only. A run also compares the
    weights, which are assumed equal here."""
    teacher, student = sizes.teacher, sizes.student
    return (
        teacher is not None
        and config.distillation.share_vision_tower
        and not config.training.train_vision_tower
        and teacher.tower is not None
        and teacher.tower == student.tower
        and (config.teacher.precision or config.training.precision) == config.training.precision
    )


def teacher_ranks(config: Config, cluster: Cluster) -> int:
    """Ranks over which the teacher's weights are sharded."""
    placement = config.teacher.placement
    return {"replicated": 1, "zero3_node": cluster.gpus_per_node}.get(placement, cluster.ranks)


def sharded(tensors: Iterable[int], ranks: int) -> int:
    """Elements on one rank: ZeRO-3 pads every tensor to a multiple of the number of ranks."""
    return sum(-(-size // ranks) for size in tensors)


def resident(used: dict[str, int], zero: dict[str, Any]) -> int:
    """Elements of the small tensors that ZeRO-3 keeps whole, next to their shards, after their first use."""
    return sum(used.values()) - gathered_once(used, zero)


def gathered_once(used: dict[str, int], zero: dict[str, Any]) -> int:
    """Elements that ZeRO-3 gathers to use these tensors once: all but the resident tensors."""
    threshold = zero["stage3_param_persistence_threshold"]
    return sum(size for size in used.values() if size > threshold)


def gathered(model: ModelSizes, zero: dict[str, Any], ranks: int) -> int:
    """The most elements that ZeRO-3 holds gathered, as its host counts them: it prefetches up to its limit on
    live parameters, and a tensor that is needed now comes on top. See :func:`alive_at_most`."""
    limit = zero["stage3_max_live_parameters"] + max(model.used.values())
    return int(min(alive_at_most(model, zero, ranks), limit))


def alive_at_most(model: ModelSizes, zero: dict[str, Any], ranks: int) -> int:
    """Elements that may be gathered in a GPU's memory at once.

    DeepSpeed (0.19.8) takes a tensor off its count when the host is done with it. The device may be far
    behind, and the allocator gives the memory to others only when it has caught up, or when none is left.
    """
    if ranks == 1 and "offload_param" not in zero:
        return 0  # the only shard is the whole tensor
    return gathered_once(model.used, zero)
