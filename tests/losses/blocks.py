"""Small layouts of images and text rows, queries and keys for them, and the block by dense attention."""

from __future__ import annotations

import torch

from alignkd.losses.attention import BlockLayout

NO_ROW = -1
VISION_TOKENS = 3
SCALING = 0.4


def padded_layout() -> BlockLayout:
    """Sample 0 has two images, sample 2 one, sample 1 none; their rows are ragged, and image 1 has none."""
    rows = [[3, 4, 8, 9, 10], [NO_ROW] * 5, [5, 11, NO_ROW, NO_ROW, NO_ROW]]
    return BlockLayout(((0, 0, 5), (0, 5, 0), (2, 0, 2)), torch.tensor(rows), VISION_TOKENS)


def packed_layout() -> BlockLayout:
    """The samples of 12, 9 and 15 columns of one row: two images (one with rows that end before the sample
    does), none, one whose text goes to the end."""
    rows = [[3, 4, 8], [9, 10, NO_ROW], [25, 34, 35]]
    return BlockLayout(((0, 0, 3), (0, 5, 2), (2, 1, 3)), torch.tensor(rows), VISION_TOKENS, (12, 9, 15))


def queries_and_keys(
    heads: int, key_heads: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """[3, heads, 12, 4] and [3, key_heads, 12, 4]."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, heads, 12, 4, generator=generator, dtype=torch.float64)
    key = torch.randn(3, key_heads, 12, 4, generator=generator, dtype=torch.float64)
    return query.to(dtype).requires_grad_(), key.to(dtype).requires_grad_()


def packed(tensor: torch.Tensor) -> torch.Tensor:
    """[3, H, 12, E] -> [1, H, 36, E]."""
    return tensor.detach().transpose(0, 1).flatten(1, 2)[None].clone().requires_grad_()


def dense_block(query: torch.Tensor, key: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    """All of [B, H, L, L], then the block: what ``output_attentions`` would give for padded rows."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.transpose(2, 3) * SCALING
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    maps = scores.masked_fill(~causal, float("-inf")).softmax(dim=-1)
    block = maps.new_zeros(len(layout.places), query.shape[1], layout.text_rows_IM.shape[1], VISION_TOKENS)
    for image, (sample, start, _) in enumerate(layout.places):
        for place, row in enumerate(layout.text_rows_IM[image].tolist()):
            if row != NO_ROW:
                block[image, :, place] = maps[sample, :, row, start : start + VISION_TOKENS]
    return block


def linear(weight: list[list[float]], bias: list[float]) -> torch.nn.Linear:
    layer = torch.nn.Linear(len(weight[0]), len(weight))
    layer.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
    return layer


def random_linear(inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(inputs, outputs, dtype=dtype)
