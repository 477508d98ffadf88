"""The whole plan of a run: sizes, memory, traffic and compute, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass

from alignkd.config import Config
from launcher.plan.compute import Compute, run_compute
from launcher.plan.memory import Memory, run_memory
from launcher.plan.sharding import rendered
from launcher.plan.sizes import RunSizes, held_sizes, run_sizes
from launcher.plan.traffic import Transfer, run_traffic, through_host
from launcher.plan.workload import Cluster, Workload, workload

GIB = 2**30
# Non-tensor overhead: the driver's context, NCCL's buffers, the workspaces of libraries, and memory lost to
# fragmentation. A margin, not measured.
CONTEXT_BYTES = GIB * 3 // 2
FRAGMENTED_SHARE = 0.05


@dataclass(frozen=True)
class Plan:
    config: Config
    cluster: Cluster
    sizes: RunSizes
    held: RunSizes  # without what a cached teacher does not need on a rank
    work: Workload
    memory: Memory
    traffic: tuple[Transfer, ...]
    through_host: int  # bytes between a GPU and host memory per step
    compute: Compute

    @property
    def needed(self) -> int:
        """Bytes per GPU, including the margin."""
        return with_margin(self.memory.peak)

    def fits(self, gpu_memory: int) -> bool:
        return self.needed <= gpu_memory

    @property
    def host_per_node(self) -> int:
        return self.memory.host * self.cluster.gpus_per_node

    @property
    def received(self) -> int:
        return sum(transfer.received_by_rank for transfer in self.traffic)

    @property
    def entering_node(self) -> int:
        return sum(transfer.entering_node for transfer in self.traffic)


def with_margin(tensor_bytes: int) -> int:
    return int(tensor_bytes * (1 + FRAGMENTED_SHARE)) + CONTEXT_BYTES


def make_plan(config: Config, cluster: Cluster, sizes: RunSizes | None = None) -> Plan:
    """Raises UserError when the models cannot be read or the global batch cannot be split."""
    sizes = sizes or run_sizes(config)
    work = workload(config, cluster, sizes.student.shapes.vision_tokens)
    files, held = rendered(config, cluster), held_sizes(config, sizes)
    return Plan(
        config,
        cluster,
        sizes,
        held,
        work,
        run_memory(config, held, work, cluster, files),
        run_traffic(config, held, work, cluster, files),
        through_host(config, held, work, cluster, files),
        run_compute(config, held, work, cluster),
    )
