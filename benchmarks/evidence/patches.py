"""What the product does not offer: other attention terms, and the defects of the authors' released code.

Each replaces the product's ``fused_attention_loss`` for the student, and the teacher's block that goes with
it. The focus of L_V stays the product's. Shapes as in ``losses.attention``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.nn import functional as F
from transformers import LlamaModel

from alignkd.data.batch import Batch
from alignkd.losses.attention import BlockLayout, text_vision_block
from alignkd.models.families.interface import ModelOutputs
from alignkd.models.families.mobilevlm import MobileVLM
from alignkd.teacher.targets import TeacherModel, TeacherTargets, block_layout
from benchmarks.evidence.loop import VISION_TOKENS
from benchmarks.evidence.targets import standard_forward

LossOfBlocks = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, BlockLayout], torch.Tensor]


@dataclass(frozen=True)
class AttentionVariant:
    """``layout`` turns the product's block into another one; ``loss`` is of student and teacher block, and
    P_attn's weight and bias; ``elements`` is what a batch's loss is divided by, given the number of heads."""

    layout: Callable[[BlockLayout], BlockLayout]
    loss: LossOfBlocks
    elements: Callable[[Batch, int], int]
    last_layer: bool = False

    def teacher_forward(self, teacher: TeacherModel, batch: Batch) -> TeacherTargets:
        targets = standard_forward(teacher, batch)
        model = teacher.model
        assert isinstance(model, MobileVLM)
        with last_layer_captured(model.language_model, self.last_layer), torch.no_grad():
            outputs: ModelOutputs = model(batch)
        layout = self.layout(block_layout(batch, model.facts))
        return targets._replace(block_IHMV=text_vision_block(*outputs.first_layer, layout))

    @contextmanager
    def for_student(self, student: MobileVLM) -> Iterator[None]:
        def replaced(
            query_BHLE: torch.Tensor,
            key_BGLE: torch.Tensor,
            weight_HT: torch.Tensor,
            bias_H: torch.Tensor,
            *,
            teacher_block_ITMV: torch.Tensor,
            scaling: float,
            layout: BlockLayout,
        ) -> torch.Tensor:
            layout = self.layout(layout)
            block_IHMV = text_vision_block(query_BHLE, key_BGLE, scaling, layout)
            _, _, M, V = block_IHMV.shape
            return self.loss(block_IHMV, teacher_block_ITMV[:, :, :M, :V], weight_HT, bias_H, layout)

        with (
            last_layer_captured(student.language_model, self.last_layer),
            patch("alignkd.engine.student_step.fused_attention_loss", replaced),
        ):
            yield


@contextmanager
def last_layer_captured(model: LlamaModel, wanted: bool) -> Iterator[None]:
    """Queries and keys of the last layer in the place of the first one's."""
    first: Any = model.layers[0].self_attn
    last: Any = model.layers[-1].self_attn
    before = first.config, last.config
    if wanted:
        first.config, last.config = last.config, first.config
    try:
        yield
    finally:
        first.config, last.config = before


def _same(layout: BlockLayout) -> BlockLayout:
    return layout


def _text_columns(layout: BlockLayout) -> BlockLayout:
    """Text queries and text keys, of the text after the image."""
    rows = [place[2] for place in layout.places]
    return dataclasses.replace(
        layout,
        vision_tokens=layout.text_rows_IM.shape[1],
        columns_IV=layout.text_rows_IM,
        spans=tuple((count, layout.vision_tokens) for count in rows),
    )


def _every_row(layout: BlockLayout) -> BlockLayout:
    """Image keys, and as queries the image's own tokens beside the text after it."""
    starts_I = torch.tensor([place[1] for place in layout.places], dtype=torch.long)
    columns_IV = starts_I[:, None] + torch.arange(layout.vision_tokens)
    return dataclasses.replace(
        layout,
        places=tuple((sample, start, layout.vision_tokens + rows) for sample, start, rows in layout.places),
        text_rows_IM=torch.cat([columns_IV, layout.text_rows_IM], dim=1),
        columns_IV=columns_IV,
        spans=((layout.vision_tokens, 0),) * len(layout.places),  # 0: no image comes before its own rows
    )


def _transposed(layout: BlockLayout) -> BlockLayout:
    """Image queries and text keys, which causal attention cannot see."""
    starts_I = torch.tensor([place[1] for place in layout.places], dtype=torch.long)
    return dataclasses.replace(
        layout,
        places=tuple((sample, start, layout.vision_tokens) for sample, start, _ in layout.places),
        text_rows_IM=starts_I[:, None] + torch.arange(layout.vision_tokens),
        vision_tokens=layout.text_rows_IM.shape[1],
        columns_IV=layout.text_rows_IM,
        spans=tuple((count, 0) for _, _, count in layout.places),
    )


def _squares(
    student_IHMV: torch.Tensor,
    teacher_ITMV: torch.Tensor,
    weight_HT: torch.Tensor,
    bias_H: torch.Tensor,
    layout: BlockLayout,
    seen_IMV: torch.Tensor | None = None,
) -> torch.Tensor:
    """Equation 1 as a sum over the elements that exist, and that are seen."""
    exists_IMV = _exists_IMV(layout)
    counted_IMV = exists_IMV if seen_IMV is None else exists_IMV & seen_IMV
    adapted_IMVH = F.linear(teacher_ITMV.movedim(1, -1), weight_HT, bias_H)
    squares_IMVH = (student_IHMV.movedim(1, -1) - adapted_IMVH).square()
    return (squares_IMVH * counted_IMV[..., None]).sum()


def _squares_of_seen(
    student_IHMV: torch.Tensor,
    teacher_ITMV: torch.Tensor,
    weight_HT: torch.Tensor,
    bias_H: torch.Tensor,
    layout: BlockLayout,
) -> torch.Tensor:
    """The same without the keys that come after their row."""
    assert layout.columns_IV is not None
    seen_IMV = layout.columns_IV[:, None, :] <= layout.text_rows_IM[:, :, None]
    return _squares(student_IHMV, teacher_ITMV, weight_HT, bias_H, layout, seen_IMV)


def _row_divergence(
    student_IHMV: torch.Tensor,
    teacher_ITMV: torch.Tensor,
    weight_HT: torch.Tensor,
    bias_H: torch.Tensor,
    layout: BlockLayout,
) -> torch.Tensor:
    """KL(teacher || student) of where each row looks within the image, averaged over heads."""
    shares = []
    for block_IHMV in (student_IHMV, teacher_ITMV):
        mean_IMV = block_IHMV.mean(dim=1).clamp(min=1e-9)
        shares.append(mean_IMV / mean_IMV.sum(dim=-1, keepdim=True))
    student_IMV, teacher_IMV = shares
    rows_IM = (teacher_IMV * (teacher_IMV.log() - student_IMV.log())).sum(dim=-1)
    unused = 0.0 * (weight_HT.sum() + bias_H.sum())
    return (rows_IM * (layout.text_rows_IM >= 0)).sum() + unused


def _exists_IMV(layout: BlockLayout) -> torch.Tensor:
    rows_IM1 = (layout.text_rows_IM >= 0)[:, :, None]
    filled_IV = layout.filled_IV()
    return rows_IM1 if filled_IV is None else rows_IM1 & filled_IV[:, None, :]


def _pairs(batch: Batch, heads: int) -> int:
    return batch.counts.attention_pairs * heads


def _text_pairs(batch: Batch, heads: int) -> int:
    return sum(place.rows * (place.rows + 1) // 2 for place in batch.image_places) * heads


def _pairs_of_every_row(batch: Batch, heads: int) -> int:
    """Image tokens see those before them and themselves."""
    within_image = VISION_TOKENS * (VISION_TOKENS + 1) // 2
    return _pairs(batch, heads) + len(batch.image_places) * within_image * heads


def _rows(batch: Batch, heads: int) -> int:
    return sum(place.rows for place in batch.image_places)


VARIANTS: dict[str, AttentionVariant] = {
    "text-text": AttentionVariant(_text_columns, _squares_of_seen, _text_pairs),
    "every row": AttentionVariant(_every_row, _squares_of_seen, _pairs_of_every_row),
    "last layer": AttentionVariant(_same, _squares, _pairs, last_layer=True),
    "transposed": AttentionVariant(_transposed, _squares, _pairs),
    "row KL": AttentionVariant(_same, _row_divergence, _rows),
}
