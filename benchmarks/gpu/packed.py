"""Packed rows of random samples, and the product's two ways to attend within them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from unittest.mock import patch

import torch

from alignkd.models import attention
from alignkd.models.attention import LENGTH_STEP, Packing
from benchmarks.gpu.sizes import Sizes

# (name, loop over packed samples, whether attention may choose cuDNN)
WAYS = (("variable length", False, False), ("loop", True, False), ("loop with cuDNN", True, True))


def random_packing(tokens: int, sizes: Sizes, seed: int) -> Packing:
    draw = random.Random(seed)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(draw.randint(sizes.shortest, sizes.longest), left))
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=sizes.device)
    longest = -(-max(lengths) // LENGTH_STEP) * LENGTH_STEP
    decoder = sizes.pair.teacher
    kernel = attention.has_varlen_kernel(sizes.device, sizes.dtype, decoder.width // decoder.heads)
    return Packing(tuple(lengths), bounds, longest, kernel)


@contextmanager
def attending(loop: bool, cudnn: bool = False) -> Iterator[None]:
    """``loop``: over the samples, where a variable-length kernel would do (a CPU has none). ``cudnn``: may
    ``scaled_dot_product_attention`` choose it?"""
    has_kernel = attention.has_varlen_kernel
    usual = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    try:
        with patch.object(attention, "has_varlen_kernel", (lambda *_: False) if loop else has_kernel):
            yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(usual)
