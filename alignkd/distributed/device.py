"""The GPU of this rank, or why it has none."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from alignkd.errors import NodeError


def take_device(accelerator: Any) -> None:
    """Make this rank's GPU the current device; nothing to do on a CPU.

    Raises NodeError with the node's name when it has no usable GPU for this rank: a launcher then retries on
    other nodes. Must run before the rendezvous, where the other ranks would wait for this one.
    """
    if accelerator.device_name() == "cpu":
        return
    count, ranks = accelerator.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if count == 0:
        raise NodeError(f"{_place()} sees no GPU: {_reason()}")
    if 1 < count < ranks:
        raise NodeError(f"{_place()} sees {count} GPUs, and its node has {ranks} ranks")
    # A cluster may show each rank only its own device. DeepSpeed reads the variable too.
    index = int(os.environ["LOCAL_RANK"]) % count
    os.environ["LOCAL_RANK"] = str(index)
    try:
        accelerator.set_device(index)
    except RuntimeError as error:
        raise NodeError(f"{_place()} cannot use GPU {index}: {_first_line(error)}") from error


def _place() -> str:
    return f"rank {os.environ.get('RANK', '0')} on {os.environ.get('SLURMD_NODENAME') or platform.node()}"


def _reason() -> str:
    if os.environ.get("CUDA_VISIBLE_DEVICES", "unset") in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']!r}; did the job request GPUs?"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:  # an AssertionError where torch was built without CUDA
        return _first_line(error)
    return "torch finds no device"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
