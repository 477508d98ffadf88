"""Attention of the language model: SDPA in every layer, and the text x vision block of layer 0 on the side.

``output_attentions`` would keep [B, H, L, L] for all layers. What Align-KD needs is one block of one layer:
how the text tokens after an image attend to its vision tokens. The registered function below leaves the
layer's output alone and computes that block from the same (rotated) queries and keys.

Shapes: B samples, H query heads, L length, D width of a head, I images, M most text rows of an image, V
vision tokens of an image, C rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION_NAME = "alignkd_sdpa"
ROWS_PER_CHUNK = 128


@dataclass
class BlockRequest:
    """Which rows and columns are wanted; layer 0 leaves the answer in ``block_IHMV``.

    Travels as a keyword argument through transformers' layers down to the attention function.
    """

    image_samples: torch.Tensor  # int64 [I]
    image_starts: torch.Tensor  # int64 [I]
    text_rows_IM: torch.Tensor  # int64, negative where an image has fewer rows
    vision_tokens: int  # V
    block_IHMV: torch.Tensor | None = None


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    block_request: BlockRequest | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA as transformers runs it, plus the requested block in layer 0."""
    if block_request is not None and module.layer_idx == 0:
        block = text_vision_block(query, key, float(kwargs["scaling"]), block_request)
        # Gradient checkpointing runs the layer a second time in backward; the first answer is the one in use.
        if block_request.block_IHMV is None:
            block_request.block_IHMV = block
    result: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **kwargs
    )
    return result


def text_vision_block(
    query_BHLD: torch.Tensor, key_BGLD: torch.Tensor, scaling: float, request: BlockRequest
) -> torch.Tensor:
    """Post-softmax probabilities [I, H, M, V] in fp32 (or wider): softmax over all causal keys, vision
    columns taken.

    G key heads serve H query heads (grouped-query attention). Rows that are filled up are zero.
    Differentiable; the full rows of a chunk are recomputed in backward, so that only M x V per head outlives
    the call.
    """
    rows_IM, V = request.text_rows_IM, request.vision_tokens
    images, M = rows_IM.shape
    H, G = query_BHLD.shape[1], key_BGLD.shape[1]
    if images == 0 or M == 0:
        # Joined to the graph all the same: under ZeRO-3 all ranks' backward passes touch the same modules.
        return (
            query_BHLD.new_zeros(images, H, M, V, dtype=_at_least_fp32(query_BHLD.dtype))
            + query_BHLD[:0].sum()
        )
    key_IGLD = key_BGLD[request.image_samples]
    query_IMHD = query_BHLD.transpose(1, 2)[request.image_samples[:, None], rows_IM.clamp(min=0)]
    query_IMGND = query_IMHD.reshape(images, M, G, H // G, -1)
    columns_IV = request.image_starts[:, None] + torch.arange(V, device=rows_IM.device)
    blocks = []
    for start in range(0, M, ROWS_PER_CHUNK):
        chunk_rows = rows_IM[:, start : start + ROWS_PER_CHUNK]
        chunk_query = query_IMGND[:, start : start + ROWS_PER_CHUNK]
        args = (chunk_query, key_IGLD, chunk_rows, columns_IV, scaling)
        if torch.is_grad_enabled() and query_BHLD.requires_grad:
            blocks.append(checkpoint(_chunk_block, *args, use_reentrant=False, preserve_rng_state=False))
        else:
            blocks.append(_chunk_block(*args))
    return torch.cat(blocks, dim=2)


def _chunk_block(
    query_ICGND: torch.Tensor,
    key_IGLD: torch.Tensor,
    rows_IC: torch.Tensor,
    columns_IV: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    scores = torch.einsum("icgnd,igld->igncl", query_ICGND, key_IGLD)
    scores = (scores.to(_at_least_fp32(scores.dtype)) * scaling).flatten(1, 2)  # [I, H, C, L]
    positions_L = torch.arange(key_IGLD.shape[2], device=rows_IC.device)
    scores = scores.masked_fill(positions_L > rows_IC.clamp(min=0)[:, None, :, None], float("-inf"))
    images, H, C, _ = scores.shape
    vision = scores.gather(3, columns_IV[:, None, None, :].expand(images, H, C, -1))
    probabilities = (vision - scores.logsumexp(dim=3, keepdim=True)).exp()
    return probabilities * (rows_IC >= 0)[:, None, :, None]


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# No mask function goes with it: without one transformers builds no mask, and does not look for packed
# sequences in the positions either, for which the host would wait for the device. Right padding needs none.
AttentionInterface.register(ATTENTION_NAME, attention)
