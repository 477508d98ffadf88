"""Everything the losses need of the teacher: compact, one set per micro-batch, movable to another device.

Shapes: B rows, L columns, D the teacher's width, N logit positions, I real images, H heads, M text rows,
V vision tokens, K focus tokens, P patches and C width of the vision tower.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import pad

from alignkd.data.batch import Batch
from alignkd.losses.attention import BlockLayout, text_vision_block
from alignkd.losses.grids import Grid, resample_attention, resample_images, resample_tokens
from alignkd.losses.top_tokens import TopTokens
from alignkd.losses.vision import focus_indices
from alignkd.models.families.interface import ModelFacts, ModelOutputs, VisionLanguageModel


class TeacherTargets(NamedTuple):
    """On the student's grids, where the teacher has others."""

    # At the batch's logit positions; the losses apply the head in chunks. No row where there is ``top``.
    hidden_ND: torch.Tensor
    block_IHMV: torch.Tensor  # first-layer attention of equation 1, in the model's dtype
    vision_tokens_IVD: torch.Tensor
    focus_indices_IK: torch.Tensor  # int64, IdxK of equation 3
    patches_IPC: torch.Tensor | None = None  # of a tower that the student shares; at least one image
    top: TopTokens | None = None  # in place of hidden states, at distillation.temperature


class TeacherModel(nn.Module):
    """A frozen model whose forward returns targets; one module, so that an engine's hooks see one forward.

    ``shares_tower``: the student has the same vision tower, so the targets include its features.
    """

    def __init__(self, model: VisionLanguageModel, top_k: int) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.top_k = top_k
        self.shares_tower = False

    @torch.no_grad()
    def forward(self, batch: Batch) -> TeacherTargets:
        own = batch if batch.of_teacher is None else batch.of_teacher
        outputs: ModelOutputs = self.model(own)
        layout = block_layout(batch, self.model.facts)
        block_IHMV = attention_block(outputs, own, self.model.facts)
        tokens_IVD = outputs.vision_tokens_IVD[: own.image_count]
        if own is not batch:
            block_IHMV, tokens_IVD = on_students_grids(block_IHMV, tokens_IVD, own, batch)
        hidden_ND, top = _logit_answers(own, outputs)
        return TeacherTargets(
            hidden_ND=hidden_ND,
            # The focus is chosen from the fp32 block. Kept is the precision of the queries and keys.
            block_IHMV=block_IHMV.to(hidden_ND.dtype),
            vision_tokens_IVD=tokens_IVD,
            focus_indices_IK=focus_indices(block_IHMV, self.top_k, layout.filled_IV()),
            patches_IPC=outputs.patches_IPC if self.shares_tower else None,
            top=top,
        )


def _logit_answers(own: Batch, outputs: ModelOutputs) -> tuple[torch.Tensor, TopTokens | None]:
    """``hidden_ND`` and ``top`` of the targets, from the cache where the batch brings what was read there."""
    if own.teacher_tokens_NK is not None and own.teacher_log_probs_NR is not None:
        no_row_0D = outputs.hidden_BLD.flatten(0, 1)[:0]
        return no_row_0D, TopTokens(own.teacher_log_probs_NR, own.teacher_tokens_NK)
    cached = own.teacher_hidden_ND
    return (logit_hidden(own, outputs) if cached is None else cached), None


def on_students_grids(
    block_IHMV: torch.Tensor, tokens_IVD: torch.Tensor, own: Batch, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both on the grids of ``batch``, filled up with zeros like its ``columns_IV``; ``own`` is the batch that
    they are of. Its text rows are those of ``batch``, in the same order."""
    assert batch.columns_IV is not None, "only images of transformers' families have grids"
    V = batch.columns_IV.shape[1]

    def attention(block: torch.Tensor, grid: Grid, wanted: Grid) -> torch.Tensor:
        made = resample_attention(block[..., : math.prod(grid)], grid, wanted)
        return pad(made, (0, V - made.shape[-1]))

    def tokens(part: torch.Tensor, grid: Grid, wanted: Grid) -> torch.Tensor:
        made = resample_tokens(part[:, : math.prod(grid)], grid, wanted)
        return pad(made, (0, 0, 0, V - made.shape[1]))

    pairs = list(zip(own.grids, batch.grids, strict=True))
    if not pairs:
        empty = block_IHMV.new_zeros(*block_IHMV.shape[:3], V)
        return empty, tokens_IVD.new_zeros(0, V, tokens_IVD.shape[2])
    return resample_images(block_IHMV, pairs, attention), resample_images(tokens_IVD, pairs, tokens)


def attention_block(outputs: ModelOutputs, batch: Batch, facts: ModelFacts) -> torch.Tensor:
    """The text x vision block [I, H, M, V] of the first layer, in fp32 (or wider)."""
    return text_vision_block(*outputs.first_layer, block_layout(batch, facts))


def logit_hidden(batch: Batch, outputs: ModelOutputs) -> torch.Tensor:
    """Hidden states [N, D] at the positions that the logit terms compare."""
    return outputs.hidden_BLD.flatten(0, 1)[batch.logit_positions_N]


def block_layout(batch: Batch, facts: ModelFacts) -> BlockLayout:
    """Where the text x vision blocks of ``batch`` are in a model's first layer."""
    columns_IV = batch.columns_IV
    vision_tokens = facts.vision_tokens if columns_IV is None else columns_IV.shape[1]
    assert vision_tokens is not None, "a family with images of different sizes says where they are"
    return BlockLayout(
        batch.image_places,
        batch.text_rows_IM,
        vision_tokens,
        batch.segments,
        columns_IV,
        batch.image_spans,
        facts.window,
    )
