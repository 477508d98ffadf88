"""What building a model of any family takes: its dtype and place, and tensors that ZeRO-3 shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import nn

from alignkd.errors import CheckpointError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class BuildOptions:
    """In which dtype and where a model is built."""

    dtype: torch.dtype
    device: torch.device | str = "cpu"  # of a sharded model: of its buffers
    zero3: dict[str, Any] | None = None  # DeepSpeed configuration that shards it, and places the shards
    group: Any = None  # process group that shares one set of shards; None: all ranks


@contextmanager
def sharded_construction(options: BuildOptions) -> Iterator[None]:
    """Parameters that are created inside are sharded at once, as ``options.zero3`` says."""
    # The dtype comes from the configuration's bf16 or fp16 section (fp32 without one). An explicit one is
    # ignored by DeepSpeed 0.19.8 where fp16 is not supported: on a CPU it would silently build a bf16 teacher
    # instead of an fp32 one.
    with deepspeed.zero.Init(data_parallel_group=options.group, config_dict_or_path=options.zero3):
        yield


@contextmanager
def gathered(parameter: nn.Parameter, modifier_rank: int | None = None) -> Iterator[None]:
    """The whole parameter inside, if ZeRO-3 shards it; changes by ``modifier_rank`` reach all shards."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=modifier_rank):
        yield


def reads_weights(options: BuildOptions) -> bool:
    """Under ZeRO-3 only the first rank of the group reads; the others receive their shards from it."""
    return options.zero3 is None or torch.distributed.get_rank(options.group) == 0


def full_tensors(model: nn.Module, *, only_frozen: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor) of every parameter; gathers ZeRO-3 shards one by one. Collective."""
    for name, parameter in model.named_parameters():
        if only_frozen and parameter.requires_grad:
            continue
        with gathered(parameter):
            yield name, parameter.data


def check_filled(model: nn.Module, unexpected: Sequence[str]) -> None:
    """Raises CheckpointError when a tensor of ``model``, which was built without memory, was left so, or was
    given one of another name."""
    values = (*model.named_parameters(), *model.named_buffers())
    problems = [f"missing: {name}" for name, value in values if value.is_meta]
    problems += [f"unexpected: {name}" for name in unexpected]
    if problems:
        raise CheckpointError(
            f"{len(problems)} tensors of the student do not fit\n  " + "\n  ".join(problems)
        )


def hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]], hashing: bool) -> str:
    """sha256 over names, shapes and bytes. Without ``hashing`` the tensors are only gone through."""
    digests = {}
    for name, value in tensors:
        if not hashing:
            continue
        data = value.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{tuple(data.shape)} {data.dtype}".encode())
        digest.update(data.flatten().view(torch.uint8).numpy().tobytes())
        digests[name] = digest.hexdigest()
    lines = "\n".join(f"{name} {digests[name]}" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()
