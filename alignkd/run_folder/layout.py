"""Do a checkpoint's shards lie as this run's engine would read them?

DeepSpeed stores flat partitions and loads them by position: with another order or size of the parts it puts
weights in the wrong places and says nothing. So a manifest records what decides the layout.

| key of ``layout`` | holds |
|---|---|
| deepspeed | the DeepSpeed file of the student, with dotted keys |
| groups | the optimizer's parameter groups: for each the [name, shape] of its parameters, in order |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignkd.config.dotted import flatten

LAYOUT = "layout"  # key of the manifest
VERSIONS_THAT_MATTER = ("torch", "deepspeed")
ROUND_ROBIN = "zero_optimization.round_robin_gradients"

# These follow the number of ranks; the engine checks their product.
_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# These change how DeepSpeed computes, communicates or logs. Any other key may decide the layout.
_HARMLESS = (
    "gradient_clipping",
    "steps_per_print",
    "wall_clock_breakdown",
    "timers.",
    "zero_allow_untested_optimizer",
    "bf16.check_grad_overflow",
    "fp16.loss_scale",
    "fp16.initial_scale_power",
    "fp16.hysteresis",
    "fp16.consecutive_hysteresis",
    "fp16.min_loss_scale",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.reduce_scatter",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.allgather_",
    "zero_optimization.overlap_comm",
    "zero_optimization.memory_efficient_linear",
    "zero_optimization.offload_optimizer.pin_memory",
    "zero_optimization.offload_param.pin_memory",
    "zero_optimization.stage3_",
)


def layout_facts(deepspeed: Mapping[str, Any], groups: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """``layout`` of a manifest; ``groups`` holds a [name, shape] for each parameter."""
    return {"deepspeed": flatten(deepspeed), "groups": [list(group) for group in groups]}


def layout_problems(
    manifest: Mapping[str, Any], current: Mapping[str, Any], *, converts: bool
) -> tuple[list[str], list[str]]:
    """What has changed since the checkpoint: why it cannot be loaded, and what is only worth a line in the
    log. Empty for the manifest of an earlier version, which does not say.

    ``converts``: the checkpoint goes through DeepSpeed's universal format, which finds parameters by name, so
    that the layout may differ. With ``round_robin_gradients`` DeepSpeed 0.19.8 writes wrong positions there.
    """
    saved = manifest.get(LAYOUT)
    if saved is None:
        return [], []
    before, now = saved["deepspeed"], current["deepspeed"]
    problems, harmless = [], []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if (old or None) == (new or None) or key in _BATCH:  # false is what a missing key means
            continue
        line = f"ds/student.json: {key}: the checkpoint has {old!r}, the run has {new!r}"
        if key.startswith(_HARMLESS):
            harmless.append(line)
        elif not converts:
            problems.append(line)
    if converts and (before.get(ROUND_ROBIN) or now.get(ROUND_ROBIN)):
        problems.append(
            f"ds/student.json: {ROUND_ROBIN}: with it, DeepSpeed cannot convert a checkpoint for another "
            "number of ranks or ZeRO stage"
        )
    if problems == [] and saved["groups"] != current["groups"]:
        problems.append(_changed_group(saved["groups"], current["groups"]))
    return problems, harmless


def version_changes(manifest: Mapping[str, Any], current: Mapping[str, str]) -> list[str]:
    """One line for each library of another version that decides how a checkpoint is read."""
    saved = manifest.get("versions") or {}
    return [
        f"{name}: the checkpoint was written with {saved[name]}, this is {current.get(name)}"
        for name in VERSIONS_THAT_MATTER
        if name in saved and saved[name] != current.get(name)
    ]


def _changed_group(before: list[Any], now: list[Any]) -> str:
    for number, (old, new) in enumerate(zip(before, now, strict=False)):
        for place, (old_one, new_one) in enumerate(zip(old, new, strict=False)):
            if old_one != new_one:
                return (
                    f"parameter {place} of optimizer group {number}: the checkpoint has {_shown(old_one)}, "
                    f"the run has {_shown(new_one)}"
                )
        if len(old) != len(new):
            return f"optimizer group {number}: the checkpoint has {len(old)} parameters, the run {len(new)}"
    return f"the checkpoint has {len(before)} optimizer groups, the run has {len(now)}"


def _shown(parameter: Sequence[Any]) -> str:
    name, shape = parameter
    return f"{name} {shape}"
