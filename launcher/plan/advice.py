"""Which settings fit best: all sensible ones are planned and compared."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

from alignkd.config import Config
from alignkd.config.combinations import divisors
from launcher.plan.measurements import measures_gradients
from launcher.plan.plan import Plan, make_plan

BUSY_TOKENS = 8192  # per micro-batch: these keep a GPU's matrix units busy, more gain little
COMFORTABLE_SHARE = 0.9  # of a GPU's memory
PLACEMENTS = ("replicated", "zero3_node", "zero3", "zero3_offload")
STAGES = (2, 3)  # accumulate in fp32; stages 0 and 1 do not, and need no less memory than 2
ADVISED = (
    "student.zero_stage",
    "student.offload",
    "teacher.placement",
    "teacher.lookahead",
    "training.micro_batch_size",
    "training.tokens_per_micro_batch",
    "training.gradient_checkpointing",
)


def largest_micro_batch(plan: Plan, gpu_memory: int) -> int | None:
    """Samples of full length per forward that fit with the plan's other settings; None: not even one."""
    for samples in reversed(_micro_batches(plan)):
        if _changed(plan, **_sized(plan, samples)).fits(gpu_memory):
            return samples
    return None


def advise(plan: Plan, gpu_memory: int) -> Plan | None:
    """The best plan that fits; None when none does.

    In this order it should keep the GPU busy, offload nothing, leave some memory free, send the least between
    nodes and through host memory, compute the least, and send the least inside a node.
    """
    fitting = [found for found in _candidates(plan) if found.fits(gpu_memory)]
    return min(fitting, key=lambda found: _cost(found, plan, gpu_memory), default=None)


def with_placement(plan: Plan, placement: str) -> Plan:
    return _changed(plan, placement=placement)


def changes(plan: Plan, advised: Plan) -> dict[str, Any]:
    """Dotted keys that ``advised`` sets differently, with its values."""
    pairs = {key: (_value(plan.config, key), _value(advised.config, key)) for key in ADVISED}
    return {key: new for key, (old, new) in pairs.items() if new != old}


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _cost(found: Plan, given: Plan, gpu_memory: int) -> tuple[float, ...]:
    """Lower is better; the first number that differs decides. Ties go to the configured settings."""
    config = found.config
    busy = min(found.work.tokens, BUSY_TOKENS)
    slow, fast = (_about(found.entering_node), _about(found.through_host)), _about(found.received)
    tight = found.needed > COMFORTABLE_SHARE * gpu_memory
    other = (
        config.teacher.placement != given.config.teacher.placement,
        found.work.samples != given.work.samples,
        config.teacher.lookahead != given.config.teacher.lookahead,
    )
    return (
        -busy,
        found.through_host > 0,
        tight,
        *slow,
        found.compute.flops,
        fast,
        config.student.zero_stage,
        *other,
        found.needed,
    )


def _about(traffic: int) -> int:
    """A number that differs where the bytes differ by some 5 %: less should not decide."""
    return round(math.log(max(traffic, 1)) / math.log(1.05))


def _candidates(plan: Plan) -> Iterator[Plan]:
    configured = plan.config.teacher.placement
    is_free = plan.sizes.teacher is not None and configured != "cached"  # whoever has a cache wants it read
    placements = PLACEMENTS if is_free else (configured,)
    stages = [stage for stage in STAGES if stage < 3 or not measures_gradients(plan.config)]
    for stage, offload, placement, again in product(stages, (False, True), placements, (True, False)):
        for samples in _micro_batches(plan):
            settings = {"zero_stage": stage, "offload": offload, "placement": placement}
            settings["gradient_checkpointing"] = again
            base = _changed(plan, **settings, **_sized(plan, samples), lookahead=None)
            yield base
            for lookahead in divisors(base.work.accumulation)[:-1] if plan.sizes.teacher is not None else []:
                yield _changed(base, lookahead=lookahead)


def _micro_batches(plan: Plan) -> list[int]:
    return divisors(plan.config.training.global_batch_size // plan.cluster.ranks)


def _sized(plan: Plan, samples: int) -> dict[str, int]:
    """The setting that yields micro-batches of ``samples`` samples of full length."""
    budget = plan.config.training.tokens_per_micro_batch
    if budget is None:
        return {"micro_batch_size": samples}
    # A budget that already yields as many may be larger than their sum: keep it.
    return {"tokens_per_micro_batch": budget if samples == plan.work.samples else samples * plan.work.length}


def _changed(plan: Plan, **values: Any) -> Plan:
    """The plan with other settings and the same models."""
    updates: dict[str, Any] = {}
    for name in ("student", "teacher", "training"):
        section = getattr(plan.config, name)
        own = {key: value for key, value in values.items() if key in type(section).model_fields}
        updates[name] = section.model_copy(update=own)
    return make_plan(plan.config.model_copy(update=updates), plan.cluster, plan.sizes)
