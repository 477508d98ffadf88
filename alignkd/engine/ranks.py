"""The process group: who this rank is, where it computes, and a CPU group for what the host must agree on."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from alignkd.engine.failures import as_shown, describe_failure, error_elsewhere
from alignkd.errors import AlignkdError, TrainingError, UserError

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    device: torch.device
    cpu_group: Any  # gloo: reductions of host numbers without a device synchronisation

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum_on_host(self, values: list[int]) -> list[int]:
        """Elementwise sum over ranks. Collective."""
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, group=self.cpu_group)
        summed: list[int] = tensor.tolist()
        return summed

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's ``value`` on every rank. Collective."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.cpu_group)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in rank order, on every rank. Collective."""
        box: list[Any] = [None] * self.world_size
        dist.all_gather_object(box, value, group=self.cpu_group)
        return box

    def while_first_works(self, work: Callable[[], None]) -> None:
        """Rank 0 does ``work``, which may take hours; the others look for its end in the store that the ranks
        have met at. A collective would time out. What ``work`` raises ends on every rank: on rank 0 as it is
        (an OSError as FileSystemError), elsewhere as an error of the same kind that names rank 0. When rank 0
        dies, its store goes with it and the others raise TrainingError. Collective.
        """
        store = dist.distributed_c10d._get_default_store()
        key = str(self.broadcast_object(uuid.uuid4().hex if self.is_first else None))
        raised: Exception | None = None
        if self.is_first:
            try:
                work()
            except Exception as error:
                raised = as_shown(error)
            store.set(key, json.dumps(None if raised is None else describe_failure(self.rank, raised)))
        failure = json.loads(_wait_for(store, key))
        # Nobody leaves, and the store with rank 0, before all have seen it. One that failed leaves anyway.
        with contextlib.suppress(RuntimeError) if failure else contextlib.nullcontext():
            self.barrier()
        if raised is not None:
            raise raised
        if failure is not None:
            raise error_elsewhere(*failure)

    def raise_together(self, own: AlignkdError | None) -> NoReturn:
        """Raise on every rank the first rank's error, or its own of the same kind. At least one has one.
        Collective."""
        told = self.gather_objects(None if own is None else describe_failure(self.rank, own))
        first = next(failure for failure in told if failure is not None)
        # One kind everywhere: what a rank does next, a last save say, depends on it.
        same_kind = told[self.rank] is not None and told[self.rank][0] == first[0]
        raise own if own is not None and same_kind else error_elsewhere(*first)

    def barrier(self) -> None:
        dist.barrier(group=self.cpu_group)


def _wait_for(store: Any, key: str) -> str:
    """The value of ``key``, as soon as rank 0 has set it."""
    try:
        while not store.check([key]):
            time.sleep(POLL_SECONDS)
        value: str = store.get(key).decode()
    except RuntimeError as error:  # of torch: no answer
        raise TrainingError(
            f"rank 0 ended while the others waited for it; its log says why ({str(error).splitlines()[0]})"
        ) from error
    return value


def node_group(ranks: Ranks, environment: Mapping[str, str] = os.environ) -> Any:
    """The device group of the ranks on this rank's node, known by NODE_RANK and LOCAL_WORLD_SIZE. Collective.

    Raises UserError (on every rank) when the variables are missing or the nodes differ in size.
    """
    facts = ranks.gather_objects((environment.get("NODE_RANK"), environment.get("LOCAL_WORLD_SIZE")))
    members = nodes_of(facts)
    # Every rank makes every group, in the same order: a group that only its members make hangs the others.
    groups = [dist.new_group(group) for group in members]
    return next(group for group, on_node in zip(groups, members, strict=True) if ranks.rank in on_node)


def nodes_of(facts: list[tuple[str | None, str | None]]) -> list[list[int]]:
    """Ranks of each node from every rank's (NODE_RANK, LOCAL_WORLD_SIZE). Raises UserError."""
    if any(value is None for fact in facts for value in fact):
        raise UserError(
            "teacher.placement = zero3_node needs NODE_RANK and LOCAL_WORLD_SIZE in each rank's environment; "
            "valid: start the ranks with `alignkd launch`, or another placement"
        )
    nodes: dict[str, list[int]] = {}
    for rank, (node, _) in enumerate(facts):
        nodes.setdefault(str(node), []).append(rank)
    stated = {str(size) for _, size in facts}
    if {str(len(members)) for members in nodes.values()} != stated or len(stated) != 1:
        sizes = ", ".join(f"node {node}: {len(members)}" for node, members in nodes.items())
        raise UserError(
            f"teacher.placement = zero3_node needs the same number of ranks on every node; here: {sizes} "
            f"(LOCAL_WORLD_SIZE: {', '.join(sorted(stated))}); valid: equal nodes, or another placement"
        )
    return list(nodes.values())


def start_ranks(timeout: timedelta = timedelta(hours=2)) -> Ranks:
    """Join the group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe."""
    accelerator = get_accelerator()
    # fp32 is fp32, in convolutions too, where torch's default is TF32. A bf16 run multiplies nothing large in
    # fp32; what it does are rotary angles, whose positions TF32 would cut to 11 bits.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if accelerator.device_name() != "cpu":
        # A cluster may show every rank its own device only. DeepSpeed reads the variable, too.
        index = int(os.environ["LOCAL_RANK"]) % max(accelerator.device_count(), 1)
        os.environ["LOCAL_RANK"] = str(index)
        accelerator.set_device(index)
    _skip_the_compiled_all_reduce()
    deepspeed.init_distributed(
        dist_backend=accelerator.communication_backend_name(), auto_mpi_discovery=False, timeout=timeout
    )
    return Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=torch.device(accelerator.current_device_name()),
        cpu_group=dist.new_group(backend="gloo", timeout=timeout),
    )


def _skip_the_compiled_all_reduce() -> None:
    """On CPUs, init_distributed compiles a shared-memory operator that only `inference_all_reduce` uses.

    Nothing here calls that. Without the operator, training needs no compiler, and ranks that start together
    do not block each other in the build.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
