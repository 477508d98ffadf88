"""A plan of a run, whether it fits, and the settings that would fit best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from alignkd.config import Config
from alignkd.config.combinations import divisors
from launcher.plan.compute import Compute, run_compute
from launcher.plan.memory import Memory, run_memory
from launcher.plan.sharding import rendered
from launcher.plan.sizes import RunSizes, run_sizes
from launcher.plan.traffic import Transfer, run_traffic
from launcher.plan.workload import Cluster, Workload, workload

GIB = 2**30
# What no tensor shows: the driver's context, NCCL's buffers, libraries' workspaces, and memory that the
# allocator cannot use because it lies in pieces.
CONTEXT_BYTES = GIB * 3 // 2
FRAGMENTED_SHARE = 0.05
BUSY_TOKENS = 8192  # a micro-batch of so many keeps a GPU's matrix units busy; more brings little
PLACEMENTS = ("replicated", "zero3_node", "zero3", "zero3_offload")
STAGES = (2, 3)  # which add up micro-batches in fp32; 0 and 1 do not, and save no memory over 2


@dataclass(frozen=True)
class Plan:
    config: Config
    cluster: Cluster
    sizes: RunSizes
    work: Workload
    memory: Memory
    traffic: tuple[Transfer, ...]
    compute: Compute

    @property
    def needed(self) -> int:
        """Bytes of a GPU, margin included."""
        return with_margin(self.memory.peak)

    def fits(self, gpu_memory: int) -> bool:
        return self.needed <= gpu_memory

    @property
    def received(self) -> int:
        return sum(transfer.received_by_rank for transfer in self.traffic)

    @property
    def entering_node(self) -> int:
        return sum(transfer.entering_node for transfer in self.traffic)


def with_margin(tensor_bytes: int) -> int:
    return int(tensor_bytes * (1 + FRAGMENTED_SHARE)) + CONTEXT_BYTES


def make_plan(config: Config, cluster: Cluster, sizes: RunSizes | None = None) -> Plan:
    """Raises UserError when the models or the split of the batch are not usable."""
    sizes = sizes or run_sizes(config)
    work = workload(config, cluster, sizes.student.config.vision_tokens)
    files = rendered(config, cluster)
    return Plan(
        config,
        cluster,
        sizes,
        work,
        run_memory(config, sizes, work, cluster, files),
        run_traffic(config, sizes, work, cluster, files),
        run_compute(config, sizes, work, cluster),
    )


def largest_micro_batch(plan: Plan, gpu_memory: int) -> int | None:
    """The most samples per forward that fit with the plan's other settings; None: not even one."""
    for size in reversed(_micro_batches(plan)):
        if _changed(plan, micro_batch_size=size).fits(gpu_memory):
            return size
    return None


def advise(plan: Plan, gpu_memory: int) -> Plan | None:
    """The best plan that fits; None when none does.

    First it should keep the GPU busy, then move nothing to host memory, then send the least between nodes,
    then inside them.
    """
    fitting = [found for found in _candidates(plan) if found.fits(gpu_memory)]
    return min(fitting, key=lambda found: _cost(found, plan), default=None)


def with_placement(plan: Plan, placement: str) -> Plan:
    return _changed(plan, placement=placement)


def changes(plan: Plan, advised: Plan) -> dict[str, Any]:
    """Dotted keys that ``advised`` sets differently."""
    keys = (
        "student.zero_stage",
        "student.offload",
        "teacher.placement",
        "teacher.lookahead",
        "training.micro_batch_size",
    )
    return {
        key: _value(advised.config, key)
        for key in keys
        if _value(advised.config, key) != _value(plan.config, key)
    }


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _cost(found: Plan, given: Plan) -> tuple[float, ...]:
    """Less is better, the first number that differs decides. At last: what is configured, if as good."""
    config = found.config
    in_host = config.student.offload + (config.teacher.placement == "zero3_offload")
    busy = min(found.work.tokens, BUSY_TOKENS)
    sent = (found.entering_node, found.received)
    other_size = config.training.micro_batch_size != given.config.training.micro_batch_size
    return (-busy, in_host, *sent, config.student.zero_stage, other_size, -found.work.window, found.needed)


def _candidates(plan: Plan) -> Iterator[Plan]:
    placements = PLACEMENTS if plan.sizes.teacher is not None else (plan.config.teacher.placement,)
    micro_batches = _micro_batches(plan)
    for stage, offload, placement, size in product(STAGES, (False, True), placements, micro_batches):
        settings = {"zero_stage": stage, "offload": offload, "placement": placement, "micro_batch_size": size}
        yield _changed(plan, **settings, lookahead=None)
        accumulation = micro_batches[-1] // size
        for lookahead in divisors(accumulation)[:-1] if plan.sizes.teacher is not None else []:
            yield _changed(plan, **settings, lookahead=lookahead)


def _micro_batches(plan: Plan) -> list[int]:
    return divisors(plan.config.training.global_batch_size // plan.cluster.ranks)


def _changed(plan: Plan, **values: Any) -> Plan:
    """The plan with other settings; the models stay as they are."""
    updates: dict[str, Any] = {}
    for name in ("student", "teacher", "training"):
        section = getattr(plan.config, name)
        ours = {key: value for key, value in values.items() if key in type(section).model_fields}
        updates[name] = section.model_copy(update=ours)
    return make_plan(plan.config.model_copy(update=updates), plan.cluster, plan.sizes)
