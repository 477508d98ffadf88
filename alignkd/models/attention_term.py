"""The attention term (equation 1) straight from queries and keys: no block is kept, nor its difference.

Written out instead of left to autograd: the usual graph keeps whole rows of attention, [H, M, keys], and the
difference. What is kept here are the inputs, which exist anyway; the rows are made again in backward. Shapes
as in ``models.attention``; T heads of the teacher.
"""

from __future__ import annotations

from typing import Any

import torch

from alignkd.models.attention import (
    BlockLayout,
    Chunk,
    at_least_fp32,
    attention_rows,
    block_chunks,
    scaled_queries,
)


def attention_term(
    query_BHLD: torch.Tensor,
    key_BGLD: torch.Tensor,
    scaling: float,
    layout: BlockLayout,
    target_ITMV: torch.Tensor,
    weight_HT: torch.Tensor,
    bias_H: torch.Tensor,
) -> torch.Tensor:
    """Sum over valid rows of (student - (weight target + bias)) squared, in fp32 (or wider), with a graph.

    All tensors get a gradient even when there is no row (zeros), so that ranks' backward passes agree.
    """
    term: torch.Tensor = _AttentionTerm.apply(  # type: ignore[no-untyped-call]
        query_BHLD, key_BGLD, target_ITMV, weight_HT, bias_H, scaling, layout
    )
    return term


class _AttentionTerm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_BHLD: torch.Tensor,
        key_BGLD: torch.Tensor,
        target_ITMV: torch.Tensor,
        weight_HT: torch.Tensor,
        bias_H: torch.Tensor,
        scaling: float,
        layout: BlockLayout,
    ) -> torch.Tensor:
        total = query_BHLD.new_zeros((), dtype=at_least_fp32(query_BHLD.dtype))
        for chunk in block_chunks(layout, query_BHLD.shape[2]):
            vision_HCV = attention_rows(query_BHLD, key_BGLD, scaling, chunk)[..., chunk.vision]
            total += _difference(vision_HCV, target_ITMV, weight_HT, bias_H, chunk).square().sum()
        ctx.save_for_backward(query_BHLD, key_BGLD, target_ITMV, weight_HT, bias_H)
        ctx.scaling, ctx.layout = scaling, layout
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_BHLD, key_BGLD, target_ITMV, weight_HT, bias_H = ctx.saved_tensors
        d_query, d_key = torch.zeros_like(query_BHLD), torch.zeros_like(key_BGLD)
        wide = at_least_fp32(weight_HT.dtype)
        d_weight, d_bias = torch.zeros_like(weight_HT, dtype=wide), torch.zeros_like(bias_H, dtype=wide)
        for chunk in block_chunks(ctx.layout, query_BHLD.shape[2]):
            maps_HCk = attention_rows(query_BHLD, key_BGLD, ctx.scaling, chunk)
            H, C, k = maps_HCk.shape
            vision_HCV = maps_HCk[..., chunk.vision]
            d_block = _difference(vision_HCV, target_ITMV, weight_HT, bias_H, chunk) * (2 * gradient)
            d_adapted = -d_block.flatten(1).to(weight_HT.dtype)
            target_TN = target_ITMV[chunk.image, :, chunk.rows].flatten(1).to(weight_HT.dtype)
            d_weight += d_adapted @ target_TN.T
            d_bias += d_adapted.sum(dim=1)
            # Softmax: p (d - sum of p d); d is zero but in the vision columns.
            weighted_HCV = d_block * vision_HCV
            d_scores = maps_HCk.mul_(-weighted_HCV.sum(dim=2, keepdim=True))
            d_scores[..., chunk.vision] += weighted_HCV
            G = key_BGLD.shape[1]
            d_scores = d_scores.to(key_BGLD.dtype).view(G, H // G * C, k)
            query_GRD = scaled_queries(query_BHLD, ctx.scaling, chunk).reshape(G, H // G * C, -1)
            key_GkD = key_BGLD[chunk.batch_row, :, chunk.keys] * ctx.scaling
            d_query[chunk.batch_row][:, chunk.rows_C] += (d_scores @ key_GkD).view(H, C, -1)
            d_key[chunk.batch_row, :, chunk.keys] += d_scores.transpose(1, 2) @ query_GRD
        return d_query, d_key, None, d_weight.to(weight_HT), d_bias.to(bias_H), None, None


def _difference(
    vision_HCV: torch.Tensor,
    target_ITMV: torch.Tensor,
    weight_HT: torch.Tensor,
    bias_H: torch.Tensor,
    chunk: Chunk,
) -> torch.Tensor:
    target_TN = target_ITMV[chunk.image, :, chunk.rows].flatten(1).to(weight_HT.dtype)
    return vision_HCV - torch.addmm(bias_H[:, None], weight_HT, target_TN).view(vision_HCV.shape)
