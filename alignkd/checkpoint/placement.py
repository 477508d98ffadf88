"""Do the weights sit where they belong? A cheap proof after each load, by a sample of every parameter.

DeepSpeed loads flat partitions by position, and what it gets wrong trains on without an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from alignkd.distributed.ranks import Ranks
from alignkd.errors import CheckpointError

WEIGHTS = "weights"  # key of the manifest
SAMPLES = 16  # elements of each parameter
MASTER_SAMPLES = 1 << 20  # elements of each group's fp32 partition on a rank
SHOWN = 3


def weight_digests(module: nn.Module, ranks: Ranks) -> dict[str, str]:
    """A hash of some elements of each trained parameter, by name: the same at any number of ranks and at any
    ZeRO stage. Nothing is gathered but the samples. Collective."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    own = _as_bytes([_own_samples(parameter) for _, parameter in named])
    # Sharded: the ranks hold the parts of a parameter in their order. Otherwise each holds all of it.
    parts = ranks.gather_objects(own) if any(hasattr(p, "ds_id") for _, p in named) else [own]
    return {
        name: hashlib.blake2b(b"".join(part[number] for part in parts), digest_size=8).hexdigest()
        for number, (name, _) in enumerate(named)
    }


def check_placement(engine: Any, expected: dict[str, str] | None, ranks: Ranks) -> None:
    """Compare the weights in ``engine`` with ``expected``, those of the manifest (None: an earlier version
    did not record them), and the optimizer's fp32 weights with the model's. Collective.

    Raises CheckpointError on all ranks when any rank finds a difference.
    """
    problems = []
    if expected is not None:
        found = weight_digests(engine.module, ranks)
        wrong = sorted(name for name in expected if found.get(name) != expected[name])
        if wrong:
            problems.append(
                f"{len(wrong)} of {len(expected)} parameters are not those that were saved: {_some(wrong)}"
            )
    misplaced = [str(number) for number, pair in enumerate(_masters(engine.optimizer)) if not _agree(*pair)]
    if misplaced:
        problems.append(
            f"the optimizer's fp32 weights are not the model's in parameter group {_some(misplaced)}"
        )
    answers = ranks.gather_objects(problems)
    first = next((rank for rank, found in enumerate(answers) if found), None)
    if first is not None:
        raise CheckpointError(
            "the checkpoint was loaded, but its weights are not where they belong, so training has not "
            f"continued (rank {first}: {'; '.join(answers[first])}). Its files are what was written, but "
            "DeepSpeed reads them in another order. Restore ds/student.json and the versions of torch and "
            "deepspeed"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _own_samples(parameter: Any) -> torch.Tensor:
    """Those of the :data:`SAMPLES` elements, evenly spaced in the flat parameter, that this rank holds."""
    flat: torch.Tensor
    size = int(getattr(parameter, "ds_numel", parameter.numel()))
    stride = max(1, size // SAMPLES)
    end = min(size, stride * SAMPLES)
    if not hasattr(parameter, "ds_id"):
        flat = parameter.detach().reshape(-1)
        return flat[:end:stride]
    flat = parameter.ds_tensor.detach().reshape(-1)
    start = flat.numel() * dist.get_rank(group=parameter.ds_process_group)
    first = -(-start // stride) * stride
    return flat[first - start : max(end - start, 0) : stride]


def _as_bytes(samples: list[torch.Tensor]) -> list[bytes]:
    """As fp32, with one copy from each device instead of one for each tensor."""
    found = [b""] * len(samples)
    for device in {sample.device for sample in samples}:
        numbers = [number for number, sample in enumerate(samples) if sample.device == device]
        whole = torch.cat([samples[number].float() for number in numbers]).cpu()
        parts = torch.split(whole, [len(samples[number]) for number in numbers])
        for number, part in zip(numbers, parts, strict=True):
            found[number] = part.numpy().tobytes()
    return found


def _masters(optimizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The model's weights and the optimizer's fp32 copy, flat and in the same order, of each group on this
    rank. Nothing where the optimizer keeps no copy."""
    if hasattr(optimizer, "single_partition_of_fp32_groups"):  # ZeRO stages 1 and 2
        for number, masters in enumerate(optimizer.single_partition_of_fp32_groups):
            rank = dist.get_rank(group=optimizer.real_dp_process_group[number])
            yield optimizer.parallel_partitioned_bit16_groups[number][rank], masters
    elif hasattr(optimizer, "fp32_groups_flat_partition"):  # bf16 without ZeRO, or with stage 1
        for number, masters in enumerate(optimizer.fp32_groups_flat_partition):
            rank = dist.get_rank(group=optimizer.real_dp_process_group[number])
            yield optimizer.bf16_partitioned_groups[number][rank], masters
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3
        pairs = zip(
            optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
        )
        yield from (pair for pair in pairs if pair[0] is not None and pair[0].numel() == pair[1].numel())
    elif hasattr(optimizer, "fp32_groups_flat"):  # fp16 without ZeRO
        yield from zip(optimizer.fp16_groups_flat, optimizer.fp32_groups_flat, strict=True)


def _agree(weights: torch.Tensor, masters: torch.Tensor) -> bool:
    stride = max(1, weights.numel() // MASTER_SAMPLES)
    sampled = masters.detach().reshape(-1)[::stride].to(weights.dtype)
    return bool(torch.equal(weights.detach().reshape(-1)[::stride].to(sampled.device), sampled))
