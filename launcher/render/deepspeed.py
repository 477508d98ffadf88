"""The two DeepSpeed files of a run, from the base files in ``ds_configs`` and its configuration. Pure.

They hold neither optimizer nor schedule: the engine passes its own. Nothing is left to DeepSpeed's ``auto``.
"""

from __future__ import annotations

import json
from typing import Any

from alignkd.config import Config
from alignkd.config.combinations import divisors
from alignkd.config.schema import TrainingSection
from alignkd.errors import UserError
from alignkd.text import counted, listed
from launcher.render.deepspeed_keys import check_keys
from launcher.render.resources import resource_folder

# Elements. Gradients larger than a bucket are not copied into one, and on a CPU nothing is gained by sending
# many of them at once.
CPU_BUCKET = 4_000_000


def accumulation_steps(training: TrainingSection, world_size: int) -> int:
    """Micro-batches per rank and optimizer step. Raises UserError, with splits that work, for a fraction.

    With a token budget, a rank may get any number of samples, and the number of micro-batches varies from
    step to step. DeepSpeed requires a fixed number all the same: the one that micro_batch_size gives, rounded
    up. It only divides by it, which the engine undoes.
    """
    whole, micro = training.global_batch_size, training.micro_batch_size
    if training.tokens_per_micro_batch is not None:
        if whole < world_size:
            raise UserError(
                f"training.global_batch_size = {whole} leaves some of {world_size} ranks without a sample; "
                f"valid: at least {world_size}, or fewer ranks"
            )
        return -(-whole // (micro * world_size))
    if whole % (micro * world_size) == 0:
        return whole // (micro * world_size)
    if whole % world_size == 0:
        fitting = f"micro-batch sizes that fit {world_size} ranks: {listed(divisors(whole // world_size))}"
    else:
        unit = micro * world_size
        sizes = listed([size for size in (whole // unit * unit, -(-whole // unit) * unit) if size])
        fitting = f"no micro-batch size fits {world_size} ranks; nearest global batch sizes: {sizes}"
    ranks = listed([count for count in divisors(whole) if whole % (micro * count) == 0]) or "none"
    raise UserError(
        f"training.global_batch_size = {whole} cannot be split over {world_size} ranks x "
        f"training.micro_batch_size = {micro}; {fitting}; rank counts that fit this micro-batch size: {ranks}"
    )


def batch_split(training: TrainingSection, world_size: int) -> str:
    """How the samples of an optimizer step are split, in words. With a token budget every step differs."""
    whole, micro, tokens = (
        training.global_batch_size,
        training.micro_batch_size,
        training.tokens_per_micro_batch,
    )
    if tokens is None:
        times = counted(accumulation_steps(training, world_size), "time")
        return f"global batch {whole} = micro-batch {micro} x {counted(world_size, 'rank')} x {times}"
    ranks = counted(world_size, "rank")
    return f"global batch {whole} over {ranks}, in micro-batches of at most {tokens} tokens"


def student_config(config: Config, world_size: int, device: str = "auto") -> dict[str, Any]:
    """DeepSpeed's configuration of the student. ``device`` "cpu" turns pinned host memory off, and stages 1
    and 2 get smaller buckets."""
    training, stage = config.training, config.student.zero_stage
    values = _base(f"student_stage{stage}.json", stage)
    accumulation = accumulation_steps(training, world_size)
    values |= {
        # The global batch size; larger with a token budget when the factors do not divide it.
        "train_batch_size": training.micro_batch_size * world_size * accumulation,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": training.max_gradient_norm,
        **_precision(training.precision, values),
    }
    if device == "cpu" and stage in (1, 2):
        zero = values["zero_optimization"]
        zero["reduce_bucket_size"] = min(zero.get("reduce_bucket_size", CPU_BUCKET), CPU_BUCKET)
    if config.student.offload:
        place = {"device": "cpu", "pin_memory": device != "cpu"}
        values["zero_optimization"]["offload_optimizer"] = place
        if stage == 3:
            values["zero_optimization"]["offload_param"] = dict(place)
    return _checked(values, "ds/student.json")


def teacher_config(config: Config, device: str = "auto") -> dict[str, Any] | None:
    """DeepSpeed's configuration of a sharded teacher: ZeRO-3 without an optimizer. None for other teachers.

    It does not say which ranks hold the shards: the engine passes their group.
    """
    placement = config.teacher.placement
    if not config.distillation.enabled or placement in ("replicated", "cached"):
        return None
    values = _base("teacher_zero3.json", 3)
    values |= {
        # required, although the teacher never trains
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        **_precision(config.teacher.precision or config.training.precision, values),
    }
    if placement == "zero3_offload":
        values["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": device != "cpu"}
    return _checked(values, "ds/teacher.json")


def _base(name: str, stage: int) -> dict[str, Any]:
    path = resource_folder("ds_configs") / name
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold one JSON object")
    check_keys(values, str(path))
    if values.get("zero_optimization", {}).get("stage") != stage:
        raise UserError(f"{path}: zero_optimization.stage must be {stage}")
    return values


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError(f"duplicate key among {listed([key for key, _ in pairs])}")
    return values


def _precision(precision: str, base: dict[str, Any]) -> dict[str, Any]:
    """The section of this precision with the settings of the base file; fp32 has none. Others are dropped."""
    sections = {name: base.pop(name, {}) for name in ("bf16", "fp16")}
    return {} if precision == "fp32" else {precision: {**sections[precision], "enabled": True}}


def _checked(values: dict[str, Any], source: str) -> dict[str, Any]:
    check_keys(values, source)
    return values
