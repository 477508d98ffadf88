"""The process group: this rank, its device, and a CPU group for reductions of host values."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from alignkd.distributed.device import take_device
from alignkd.distributed.failures import as_shown, describe_failure, error_elsewhere
from alignkd.distributed.rendezvous import meet
from alignkd.errors import AlignkdError, TrainingError

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    device: torch.device
    cpu_group: Any  # gloo: reduces host numbers without a device synchronisation

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum_on_host(self, values: list[int]) -> list[int]:
        """Element-wise sum over the ranks. Collective."""
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

    def run_on_rank0(self, work: Callable[[], object]) -> None:
        """Run ``work``, which may take hours, on rank 0 while the others wait. Collective.

        They poll the store that the ranks met at, because a collective would time out. An exception of
        ``work`` is raised on every rank: on rank 0 as it is (an OSError as FileSystemError), elsewhere as an
        error of the same kind that names rank 0. If rank 0 dies, its store goes with it and the others raise
        TrainingError.
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
        # Rank 0 must not exit, and its store with it, before all have read the key. After a failure it may be
        # gone anyway.
        with contextlib.suppress(RuntimeError) if failure else contextlib.nullcontext():
            self.barrier()
        if raised is not None:
            raise raised
        if failure is not None:
            raise error_elsewhere(*failure)

    def raise_together(self, own: AlignkdError | None) -> NoReturn:
        """Raise :meth:`shared_error` on every rank. Collective."""
        raise self.shared_error(own)

    def shared_error(self, own: AlignkdError | None) -> AlignkdError:
        """On every rank: the error of the first rank that has one, or a rank's own of the same kind. At least
        one rank must have one. Collective."""
        failures = self.gather_objects(None if own is None else describe_failure(self.rank, own))
        first = next(failure for failure in failures if failure is not None)
        # One kind everywhere, because it decides what a rank does next (a last save, for instance).
        same_kind = failures[self.rank] is not None and failures[self.rank][0] == first[0]
        return own if own is not None and same_kind else error_elsewhere(*first)

    def barrier(self) -> None:
        dist.barrier(group=self.cpu_group)


def _wait_for(store: Any, key: str) -> str:
    """The value of ``key`` once rank 0 has set it."""
    try:
        while not store.check([key]):
            time.sleep(POLL_SECONDS)
        value: str = store.get(key).decode()
    except RuntimeError as error:  # torch's: the store does not answer
        raise TrainingError(
            f"rank 0 exited while the others waited for it; its log says why ({str(error).splitlines()[0]})"
        ) from error
    return value


def start_ranks(rendezvous_seconds: float = 300.0, timeout: timedelta = timedelta(hours=2)) -> Ranks:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe.

    Raises NodeError when this rank gets no GPU, and TrainingError when not all ranks come within
    ``rendezvous_seconds``; ``timeout`` is that of later collectives.
    """
    accelerator = get_accelerator()
    # fp32 means fp32, also in convolutions, where torch defaults to TF32. A bf16 run has only small fp32
    # products: rotary angles, whose positions TF32 would cut to 11 bits.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    # cuDNN's attention plans every new shape (111 ms each, forward and backward, on an H200), and batches
    # differ in length and number of images all the time. Flash attention takes as long and plans nothing.
    torch.backends.cuda.enable_cudnn_sdp(False)
    take_device(accelerator)
    if accelerator.device_name() == "cpu":
        _skip_the_compiled_all_reduce()
    store = meet(rendezvous_seconds)
    deepspeed.init_distributed(
        dist_backend=accelerator.communication_backend_name(), auto_mpi_discovery=False, timeout=timeout
    )
    del store  # the group has joined it, and keeps it
    return Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=torch.device(accelerator.current_device_name()),
        cpu_group=dist.new_group(backend="gloo", timeout=timeout),
    )


def _skip_the_compiled_all_reduce() -> None:
    """On CPUs, init_distributed compiles a shared-memory operator that only `inference_all_reduce` uses. (On
    other devices it does not, and looking at the table would probe all operators.)

    Nothing here calls that. Without the operator, training needs no compiler, and ranks that start together
    do not block each other in the build.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
