"""The fused head by the size of its chunks, and its weight's gradient summed in fp32 in two ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from unittest.mock import patch

import torch

from alignkd.losses import fused_logits
from alignkd.losses.logits import LogitTargets
from benchmarks.gpu.rows import Row
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import timed
from benchmarks.measure import Edge, step_memory
from benchmarks.models import VOCABULARY

Accumulate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def measure(sizes: Sizes) -> Iterator[Row]:
    for chunk in sizes.chunks:
        with patch.object(fused_logits, "POSITIONS_PER_CHUNK", chunk):
            yield {"what": f"whole head, {sizes.positions} positions, {chunk} a chunk", **_head(sizes)}
    for chunk in sizes.chunks:
        for name, accumulate in WAYS.items():
            what = f"weight's gradient, {sizes.positions} positions, {chunk} a chunk, {name}"
            try:
                yield {"what": what, **_weight_gradient(sizes, chunk, accumulate)}
            except (RuntimeError, TypeError) as error:  # not for this device, or not in this version of torch
                yield {"what": what, "note": str(error).splitlines()[0][:200]}


def _head(sizes: Sizes) -> Row:
    hidden = _random(sizes, sizes.positions, sizes.pair.student.width).requires_grad_()
    weight = (_random(sizes, VOCABULARY, sizes.pair.student.width) * 0.02).requires_grad_()
    targets = LogitTargets(
        torch.randint(VOCABULARY, (sizes.positions,), device=sizes.device),
        teacher_hidden_ND=_random(sizes, sizes.positions, sizes.pair.teacher.width),
        teacher_weight_WD=_random(sizes, VOCABULARY, sizes.pair.teacher.width) * 0.02,
    )

    def step() -> None:
        hidden.grad = weight.grad = None
        scales = (1.0 / sizes.positions, 1.0 / sizes.positions)
        losses = fused_logits.fused_logit_losses(hidden, weight, targets=targets, scales=scales)
        losses.loss.backward()  # type: ignore[no-untyped-call]

    taken = timed(step, sizes.device, sizes.rounds)
    memory = step_memory(step, Edge(), sizes.device)
    return {"ms": taken.device_ms, "host ms": taken.host_ms, "peak MiB": memory.peak / 2**20}


def _weight_gradient(sizes: Sizes, chunk: int, accumulate: Accumulate) -> Row:
    d_logits = _random(sizes, sizes.positions, VOCABULARY)
    hidden = _random(sizes, sizes.positions, sizes.pair.student.width)
    total = torch.zeros(VOCABULARY, hidden.shape[1], device=sizes.device)

    def run() -> torch.Tensor:
        result = total.zero_()
        for start in range(0, sizes.positions, chunk):
            part = slice(start, start + chunk)
            result = accumulate(result, d_logits[part].T, hidden[part])
        return result

    exact = d_logits.float().T @ hidden.float()
    error = float((run() - exact).norm() / exact.norm())
    taken = timed(run, sizes.device, sizes.rounds)
    memory = step_memory(partial(run), Edge(), sizes.device)
    return {"ms": taken.device_ms, "host ms": taken.host_ms, "peak MiB": memory.peak / 2**20, "error": error}


def added(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """As the product does it."""
    return total.add_(left @ right)


def fp32_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return total.add_(torch.mm(left, right, out_dtype=torch.float32))


def fp32_sum(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = torch.ops.aten.addmm.dtype_out(total, left, right, torch.float32, out=total)
    return result


WAYS: dict[str, Accumulate] = {
    "product, then added": added,
    "fp32 product, then added": fp32_product,
    "added within the product": fp32_sum,
}


def _random(sizes: Sizes, rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, device=sizes.device, dtype=sizes.dtype)
