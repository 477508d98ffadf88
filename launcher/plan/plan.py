"""A run's sizes, memory, traffic and work together, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass

from alignkd.config import Config
from launcher.plan.compute import Compute, run_compute
from launcher.plan.memory import Memory, run_memory
from launcher.plan.sharding import rendered
from launcher.plan.sizes import RunSizes, run_sizes
from launcher.plan.traffic import Transfer, run_traffic, through_host
from launcher.plan.workload import Cluster, Workload, workload

GIB = 2**30
# What no tensor shows: the driver's context, NCCL's buffers, libraries' workspaces, and memory that the
# allocator cannot use because it lies in pieces. Not measured: a margin.
CONTEXT_BYTES = GIB * 3 // 2
FRAGMENTED_SHARE = 0.05


@dataclass(frozen=True)
class Plan:
    config: Config
    cluster: Cluster
    sizes: RunSizes
    work: Workload
    memory: Memory
    traffic: tuple[Transfer, ...]
    through_host: int  # bytes between a GPU and host memory in a step
    compute: Compute

    @property
    def needed(self) -> int:
        """Bytes of a GPU, margin included."""
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
        through_host(config, sizes, work, cluster, files),
        run_compute(config, sizes, work, cluster),
    )
