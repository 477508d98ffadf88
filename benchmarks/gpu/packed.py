"""Two ways to attend within the samples of a packed row, for transformers' attention interface."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import varlen
from transformers import AttentionInterface

from alignkd.models.attention import ATTENTION_NAME
from benchmarks.gpu.sizes import Sizes

LOOP = ATTENTION_NAME  # the product's: one call per run of samples of equal length
VARIABLE = "benchmark_variable_length"


@dataclass(frozen=True)
class Packing:
    """Samples of a packed row, for either function."""

    segments: tuple[int, ...]
    starts: torch.Tensor  # int32 [samples + 1] on the device, from 0 to the tokens of the row

    @property
    def longest(self) -> int:
        """Rounded up, so that few values occur."""
        return -(-max(self.segments) // 128) * 128

    def arguments(self, name: str) -> dict[str, Any]:
        if name == LOOP:
            return {"segments": self.segments}
        return {"starts": self.starts, "longest": self.longest}


def random_packing(tokens: int, sizes: Sizes, seed: int) -> Packing:
    draw = random.Random(seed)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(draw.randint(sizes.shortest, sizes.longest), left))
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=sizes.device)
    return Packing(tuple(lengths), starts)


def variable_length(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    starts: torch.Tensor,
    longest: int,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """[1, H, L, D] each -> [1, L, H, D], by torch's variable-length flash attention. Elsewhere, where that
    does not run, a mask says the same."""
    if has_kernel(query):
        attend: Any = varlen.varlen_attn
        tokens = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        # The window: all tokens before, none after.
        return attend(*tokens, starts, starts, longest, longest, scale=scaling, window_size=(-1, 0))[
            None
        ], None
    columns = torch.arange(query.shape[2], device=query.device)
    samples = torch.bucketize(columns, starts, right=True)
    seen = (samples[:, None] == samples) & (columns[:, None] >= columns)
    return F.scaled_dot_product_attention(query, key, value, seen, scale=scaling).transpose(1, 2), None


def has_kernel(query: torch.Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


AttentionInterface.register(VARIABLE, variable_length)
