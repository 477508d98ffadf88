"""Equation 1, ``L_A = MSE(P_attn(A_T), A_S)``, on the text x vision block of the first layer's attention.

A is post-softmax: the softmax runs over all causal keys of the sample, then the columns of the image's vision
tokens are taken, in the rows of the text tokens after that image. P_attn is a 1x1 convolution over heads with
bias. There are two forms of the same sum: :func:`plain_attention_loss` leaves the equation to autograd, which
keeps whole rows of attention for backward; :func:`fused_attention_loss` keeps its inputs only.

Shapes: B rows of the batch, L columns, I images, M text rows (of the image that has most), V vision tokens of
an image, T heads of the teacher, H query heads (in a loss: of the student), G key heads, E width of a head,
C text rows of a chunk, K keys that these rows can see.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from alignkd.losses.precision import at_least_fp32

ROWS_PER_CHUNK = 512


@dataclass(frozen=True)
class BlockLayout:
    """Which rows and columns of the attention map belong to the block.

    ``places`` has (sample, column of the first vision token within the sample, number of text rows) for each
    image, on the host, so that loops over images never wait for the device.

    The vision tokens of an image are V consecutive ones, unless ``columns_IV`` says where they are: in tiles
    with separators between them, and fewer than V of some images.
    """

    places: tuple[tuple[int, int, int], ...]  # I
    text_rows_IM: torch.Tensor  # int64, columns of the batch's rows; negative where an image has fewer than M
    vision_tokens: int  # V, of the image that has most
    segments: tuple[int, ...] = ()  # lengths of packed samples; empty: every row of the batch is one sample
    columns_IV: torch.Tensor | None = None  # int64, within the sample, ascending; negative: filler at the end
    spans: tuple[tuple[int, int], ...] = ()  # with columns_IV: (vision tokens, columns from first to last)
    window: int | None = None  # a row sees itself and the window - 1 keys before it; None: all keys before it

    def filled_IV(self) -> torch.Tensor | None:
        """Where vision tokens are, if not everywhere."""
        return None if self.columns_IV is None else self.columns_IV >= 0


def text_vision_block(
    query_BHLE: torch.Tensor, key_BGLE: torch.Tensor, scaling: float, layout: BlockLayout
) -> torch.Tensor:
    """A of equation 1, [I, H, M, V] in fp32 (or wider), from queries and keys after rotary embedding.

    G key heads serve H query heads (grouped-query attention). Rows and vision tokens that an image does not
    have are zero.
    """
    images, M = layout.text_rows_IM.shape
    shape = (images, query_BHLE.shape[1], M, layout.vision_tokens)
    block_IHMV = query_BHLE.new_zeros(shape, dtype=at_least_fp32(query_BHLE.dtype))
    for chunk in _chunks(layout, query_BHLE.shape[2]):
        maps_HCK = attention_rows(query_BHLE, key_BGLE, scaling, chunk)
        block_IHMV[chunk.image, :, chunk.rows, : chunk.vision_tokens] = maps_HCK[..., chunk.vision]
    return block_IHMV


def attention_loss_sum(
    teacher_block_ITMV: torch.Tensor,
    student_block_IHMV: torch.Tensor,
    weight_HT: torch.Tensor,
    bias_H: torch.Tensor,
    text_rows_IM: torch.Tensor,
    filled_IV: torch.Tensor | None = None,
) -> torch.Tensor:
    """Equation 1 as a sum over valid rows (``text_rows_IM`` >= 0) and vision tokens (``filled_IV``; None: all
    of them), in fp32 (or wider), with a graph.

    ``weight_HT`` and ``bias_H`` are P_attn's.
    """
    teacher_IMVT = teacher_block_ITMV.movedim(1, -1).to(weight_HT.dtype)
    difference = student_block_IHMV.movedim(1, -1) - F.linear(teacher_IMVT, weight_HT, bias_H)
    squares_IMVH = difference.to(at_least_fp32(difference.dtype)).square()
    squares_IMVH = squares_IMVH * (text_rows_IM >= 0)[:, :, None, None]
    return (squares_IMVH if filled_IV is None else squares_IMVH * filled_IV[:, None, :, None]).sum()


def plain_attention_loss(
    query_BHLE: torch.Tensor,
    key_BGLE: torch.Tensor,
    weight_HT: torch.Tensor,
    bias_H: torch.Tensor,
    *,
    teacher_block_ITMV: torch.Tensor,
    scaling: float,
    layout: BlockLayout,
) -> torch.Tensor:
    """The sum of equation 1 by autograd: the reference in tests and benchmarks.

    All four tensors get a gradient even when there is no row (zeros): ZeRO-3 waits for those of queries and
    keys before it releases P_attn, and a rank that did not get them would deadlock the others.
    """
    block_IHMV = text_vision_block(query_BHLE, key_BGLE, scaling, layout)
    loss = attention_loss_sum(
        teacher_block_ITMV, block_IHMV, weight_HT, bias_H, layout.text_rows_IM, layout.filled_IV()
    )
    return loss + 0.0 * (query_BHLE.sum() + key_BGLE.sum())


def fused_attention_loss(
    query_BHLE: torch.Tensor,
    key_BGLE: torch.Tensor,
    weight_HT: torch.Tensor,
    bias_H: torch.Tensor,
    *,
    teacher_block_ITMV: torch.Tensor,
    scaling: float,
    layout: BlockLayout,
) -> torch.Tensor:
    """The sum of equation 1 with its gradient written out: rows of attention are computed again in backward,
    a chunk at a time, and no block is kept. Gradients as in :func:`plain_attention_loss`."""
    loss: torch.Tensor = _FusedAttentionLoss.apply(  # type: ignore[no-untyped-call]
        query_BHLE, key_BGLE, weight_HT, bias_H, teacher_block_ITMV, scaling, layout
    )
    return loss


class _FusedAttentionLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_BHLE: torch.Tensor,
        key_BGLE: torch.Tensor,
        weight_HT: torch.Tensor,
        bias_H: torch.Tensor,
        teacher_block_ITMV: torch.Tensor,
        scaling: float,
        layout: BlockLayout,
    ) -> torch.Tensor:
        total = query_BHLE.new_zeros((), dtype=at_least_fp32(query_BHLE.dtype))
        for chunk in _chunks(layout, query_BHLE.shape[2]):
            student_HCV = attention_rows(query_BHLE, key_BGLE, scaling, chunk)[..., chunk.vision]
            teacher_TN = _teacher_rows(teacher_block_ITMV, chunk, weight_HT.dtype)
            total += _difference(student_HCV, teacher_TN, weight_HT, bias_H).square().sum()
        ctx.save_for_backward(query_BHLE, key_BGLE, weight_HT, bias_H, teacher_block_ITMV)
        ctx.scaling, ctx.layout = scaling, layout
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_BHLE, key_BGLE, weight_HT, bias_H, teacher_block_ITMV = ctx.saved_tensors
        G, wide = key_BGLE.shape[1], at_least_fp32(weight_HT.dtype)
        d_query, d_key = torch.zeros_like(query_BHLE), torch.zeros_like(key_BGLE)
        d_weight, d_bias = torch.zeros_like(weight_HT, dtype=wide), torch.zeros_like(bias_H, dtype=wide)
        for chunk in _chunks(ctx.layout, query_BHLE.shape[2]):
            maps_HCK = attention_rows(query_BHLE, key_BGLE, ctx.scaling, chunk)
            H, C, K = maps_HCK.shape
            student_HCV = maps_HCK[..., chunk.vision]
            teacher_TN = _teacher_rows(teacher_block_ITMV, chunk, weight_HT.dtype)
            d_block = _difference(student_HCV, teacher_TN, weight_HT, bias_H) * (2 * gradient)
            d_adapted = -d_block.flatten(1).to(weight_HT.dtype)
            d_weight += d_adapted @ teacher_TN.T
            d_bias += d_adapted.sum(dim=1)
            # Gradient of the softmax: p (d - sum of p d), where d is zero outside the vision columns.
            weighted_HCV = d_block * student_HCV
            d_scores = maps_HCK.mul_(-weighted_HCV.sum(dim=2, keepdim=True))
            d_scores[..., chunk.vision] += weighted_HCV
            d_scores = d_scores.to(key_BGLE.dtype).view(G, H // G * C, K)
            query_HCE = query_BHLE[chunk.batch_row][:, chunk.rows_C] * ctx.scaling
            query_GRE = query_HCE.reshape(G, H // G * C, -1)
            key_GKE = key_BGLE[chunk.batch_row, :, chunk.keys] * ctx.scaling
            d_query[chunk.batch_row][:, chunk.rows_C] += (d_scores @ key_GKE).view(H, C, -1)
            d_key[chunk.batch_row, :, chunk.keys] += d_scores.transpose(1, 2) @ query_GRE
        return d_query, d_key, d_weight.to(weight_HT), d_bias.to(bias_H), None, None, None


def _teacher_rows(teacher_block_ITMV: torch.Tensor, chunk: Chunk, dtype: torch.dtype) -> torch.Tensor:
    """[T, C * V] of the chunk, in P_attn's dtype."""
    return teacher_block_ITMV[chunk.image, :, chunk.rows, : chunk.vision_tokens].flatten(1).to(dtype)


def _difference(
    student_HCV: torch.Tensor, teacher_TN: torch.Tensor, weight_HT: torch.Tensor, bias_H: torch.Tensor
) -> torch.Tensor:
    """A_S - P_attn(A_T). N stands for C x V."""
    return student_HCV - torch.addmm(bias_H[:, None], weight_HT, teacher_TN).view(student_HCV.shape)


class Chunk(NamedTuple):
    """Some text rows of one image, few enough for their whole rows of attention to exist at once."""

    image: int
    rows: slice  # of the image's text rows
    rows_C: torch.Tensor  # int64, columns of these tokens in the batch's row
    batch_row: int
    keys: slice  # K columns of the batch's row, from the beginning of the sample
    vision: slice | torch.Tensor  # which of those keys are the image's V vision tokens
    vision_tokens: int  # V of this image
    seen_by_all: int  # how many of those keys come before every row of the chunk
    window: int | None  # as in BlockLayout


def _chunks(layout: BlockLayout, columns: int) -> Iterator[Chunk]:
    """All valid rows. ``columns`` is L."""
    begins = [0, *accumulate(layout.segments)]
    for image, (sample, start, row_count) in enumerate(layout.places):
        batch_row, begin, length = sample, 0, columns
        if layout.segments:
            batch_row, begin, length = 0, begins[sample], layout.segments[sample]
        count, width = layout.vision_tokens, layout.vision_tokens
        vision: slice | torch.Tensor = slice(start, start + count)
        if layout.columns_IV is not None:
            count, width = layout.spans[image]
            vision = layout.columns_IV[image, :count]
        for first in range(0, row_count, ROWS_PER_CHUNK):
            rows = slice(first, min(first + ROWS_PER_CHUNK, row_count))
            # Rows ascend, so the columns behind the chunk's last row hold at least the rows that follow. This
            # bound is exact when a sample ends in text, and never leaves a visible key out.
            visible = length - (row_count - rows.stop)
            yield Chunk(
                image=image,
                rows=rows,
                rows_C=layout.text_rows_IM[image, rows],
                batch_row=batch_row,
                keys=slice(begin, begin + visible),
                vision=vision,
                vision_tokens=count,
                # The image and the rows of earlier chunks come before every row of this one. With a window,
                # what comes before may be out of sight.
                seen_by_all=start + width + first if layout.window is None else 0,
                window=layout.window,
            )


def attention_rows(
    query_BHLE: torch.Tensor, key_BGLE: torch.Tensor, scaling: float, chunk: Chunk
) -> torch.Tensor:
    """Probabilities [H, C, K] in fp32 (or wider), zero where the key comes after the row, or so long before
    it that it is out of the window.

    So are the scores: rounded to bf16 before the softmax, they would change the block by up to 1 %. These are
    few rows of one layer, so the product in fp32 costs little.
    """
    wide = at_least_fp32(query_BHLE.dtype)
    query_HCE = query_BHLE[chunk.batch_row][:, chunk.rows_C].to(wide) * scaling
    key_GKE = key_BGLE[chunk.batch_row, :, chunk.keys].to(wide)
    H, C, _ = query_HCE.shape
    G, K, _ = key_GKE.shape
    scores = query_HCE.reshape(G, H // G * C, -1) @ key_GKE.transpose(1, 2)
    scores_HCK = scores.view(H, C, K)
    first, end = chunk.keys.start + chunk.seen_by_all, chunk.keys.stop
    columns = torch.arange(first, end, device=scores.device)
    hidden_CK = columns > chunk.rows_C[:, None]
    if chunk.window is not None:
        hidden_CK |= columns <= chunk.rows_C[:, None] - chunk.window
    scores_HCK[..., chunk.seen_by_all :].masked_fill_(hidden_CK, float("-inf"))
    return scores_HCK.softmax(dim=2)
