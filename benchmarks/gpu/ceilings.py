"""What the chip can do, which attention torch chooses, and what each new length costs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional as F

from benchmarks.gpu.packed import attending
from benchmarks.gpu.rows import Row
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import first_call_ms, kernels, timed

SHORTEST = 300
ATTENTION_KERNELS = ("flash", "cudnn", "fmha", "attention", "sdp")


def measure(sizes: Sizes) -> Iterator[Row]:
    yield _product(sizes)
    yield _copy(sizes)
    for cudnn in (True, False):
        yield from _attention(sizes, cudnn)


def _product(sizes: Sizes) -> Row:
    n = sizes.matrix
    left, right = (torch.randn(n, n, device=sizes.device, dtype=sizes.dtype) for _ in range(2))
    taken = timed(lambda: left @ right, sizes.device, sizes.rounds)
    rate = 2 * n**3 / taken.device_ms / 1e9
    return {"what": f"matrix product of {n} x {n}", "value": rate, "unit": "TFLOP/s"}


def _copy(sizes: Sizes) -> Row:
    source = torch.randint(256, (sizes.copied_bytes,), device=sizes.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    taken = timed(lambda: target.copy_(source), sizes.device, sizes.rounds)
    rate = 2 * sizes.copied_bytes / taken.device_ms / 1e6
    return {"what": "copy, bytes read and written", "value": rate, "unit": "GB/s"}


def _attention(sizes: Sizes, cudnn: bool) -> Iterator[Row]:
    """Forward and backward of one sample at a time. The lengths are new in each of the two runs."""
    heads = sizes.pair.teacher.heads
    width = sizes.pair.teacher.width // heads
    setting = f"cuDNN attention {'on' if cudnn else 'off'}"

    def attend(length: int) -> None:
        shape = (1, heads, length, width)
        query, key, value = (
            torch.randn(shape, device=sizes.device, dtype=sizes.dtype, requires_grad=True) for _ in range(3)
        )
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        output.sum().backward()  # type: ignore[no-untyped-call]

    with attending(loop=False, cudnn=cudnn):
        attend(SHORTEST - 1)  # libraries load here
        found = kernels(partial(attend, SHORTEST - 1), sizes.device).names
        chosen = [name for name in found if any(word in name.lower() for word in ATTENTION_KERNELS)]
        yield {"what": f"kernels chosen, {setting}", "value": ", ".join(name[:60] for name in chosen[:3])}
        times = [
            first_call_ms(partial(attend, SHORTEST + 13 * number + cudnn), sizes.device)
            for number in range(sizes.new_lengths)
        ]
    what = f"first forward and backward at a new length, {setting}"
    yield {"what": f"{what}: median of {len(times)}", "value": statistics.median(times), "unit": "ms"}
    yield {"what": f"{what}: all", "value": sum(times), "unit": "ms"}
