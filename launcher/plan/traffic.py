"""What an optimizer step sends between GPUs: gathers of teacher and student, gradients, new weights.

Counted for ring algorithms, as in NCCL: in a gather (or a reduce-scatter) of B bytes over n ranks every rank
receives B (n - 1) / n, and B (m - 1) / m enter each of m nodes; an all-reduce is both. The padding of shards
and a few scalars are neglected.
"""

from __future__ import annotations

from dataclasses import dataclass

from alignkd.config import Config
from launcher.plan.sharding import (
    Rendered,
    gathered_once,
    resident,
    shares_tower,
    student_size,
    teacher_ranks,
    teacher_size,
)
from launcher.plan.sizes import RunSizes
from launcher.plan.trained import trained_parts
from launcher.plan.workload import Cluster, Workload


@dataclass(frozen=True)
class Transfer:
    """``bytes`` is the full size: what the gathers of a whole optimizer step produce on each rank."""

    name: str
    bytes: int
    ranks: int  # that take part
    nodes: int  # that these ranks are on
    passes: int = 1  # 2 for an all-reduce

    @property
    def received_by_rank(self) -> int:
        return self.bytes * (self.ranks - 1) // self.ranks * self.passes

    @property
    def entering_node(self) -> int:
        """Bytes that a node receives from other nodes."""
        return self.bytes * (self.nodes - 1) // self.nodes * self.passes


def run_traffic(
    config: Config, sizes: RunSizes, work: Workload, cluster: Cluster, files: Rendered
) -> tuple[Transfer, ...]:
    found = _teacher_transfers(config, sizes, work, cluster, files)
    found += _student_transfers(config, sizes, work, cluster, files)
    return tuple(transfer for transfer in found if transfer.bytes and transfer.ranks > 1)


def through_host(config: Config, sizes: RunSizes, work: Workload, cluster: Cluster, files: Rendered) -> int:
    """Bytes between a GPU and host memory: for what is offloaded, the rank's share of all that is sent."""
    found: list[Transfer] = []
    if files.teacher is not None and "offload_param" in files.teacher:
        found += _teacher_transfers(config, sizes, work, cluster, files)
    if config.student.offload:
        found += _student_transfers(config, sizes, work, cluster, files)
    return sum(transfer.bytes // transfer.ranks for transfer in found)


def _teacher_transfers(
    config: Config, sizes: RunSizes, work: Workload, cluster: Cluster, files: Rendered
) -> list[Transfer]:
    teacher, zero = sizes.teacher, files.teacher
    if teacher is None or zero is None:
        return []
    size, ranks = teacher_size(config), teacher_ranks(config, cluster)
    nodes = cluster.nodes if ranks == cluster.ranks else 1
    # The losses gather the head separately.
    elements = gathered_once(teacher.used, zero) - teacher.count("head.")
    windows = -(-work.accumulation // work.window)
    head = 0 if config.teacher.keep_head else teacher.head  # kept: gathered in the first step only
    return [
        Transfer("teacher's layers", elements * size * windows, ranks, nodes),
        Transfer("teacher's head", head * size, ranks, nodes),
    ]


def _student_transfers(
    config: Config, sizes: RunSizes, work: Workload, cluster: Cluster, files: Rendered
) -> list[Transfer]:
    stage, size = config.student.zero_stage, student_size(config)
    everywhere = (cluster.ranks, cluster.nodes)
    gradients = sum(sizes.trainable(config).values()) * size
    if stage == 0:
        return [Transfer("gradients", gradients, *everywhere, passes=2)]
    # At stage 1 each rank keeps whole gradients until the last micro-batch. Stages 1 and 2 all-reduce them,
    # in spite of `reduce_scatter: true` (DeepSpeed 0.19.8); only stage 3 reduces and scatters.
    times = 1 if stage == 1 else work.accumulation
    found = [Transfer("gradients", gradients * times, *everywhere, passes=1 if stage == 3 else 2)]
    if stage < 3:
        return [*found, Transfer("new weights", gradients, *everywhere)]
    used, trained = sizes.student.used | sizes.adapters, trained_parts(config)
    # The head is gathered for itself, also where its weight is that of the embeddings.
    used["head.weight"] = sizes.student.head
    backward = {name: size for name, size in used.items() if trained.is_in_backward(name)}
    # A tower that is shared with the teacher does not run here.
    is_shared = shares_tower(config, sizes)
    forward = {
        name: size for name, size in used.items() if not (is_shared and name.startswith("vision_tower."))
    }
    elements = gathered_once(forward, files.student) + gathered_once(backward, files.student)
    # The tensors that stay whole are gathered once, after the update, frozen and unused ones too.
    small = resident(sizes.student.tensors | sizes.adapters, files.student)
    weights = (elements * work.accumulation + small) * size
    # DeepSpeed saves some of this by keeping what it needs again soon.
    return [*found, Transfer("student's weights, at most", weights, *everywhere)]
