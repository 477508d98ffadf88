"""What the student's engine trains: student, adapters, and in its forward the loss of one micro-batch."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from alignkd.config.schema import DistillationSection
from alignkd.data.batch import Batch
from alignkd.losses.alignment import vision_loss_sums
from alignkd.losses.fused_head import LogitLosses
from alignkd.losses.logits import LogitTargets
from alignkd.losses.terms import ElementSizes
from alignkd.models.adapters import AlignmentAdapters
from alignkd.models.mobilevlm import MobileVLM
from alignkd.teacher.targets import TeacherTargets


class StepOutput(NamedTuple):
    loss: torch.Tensor  # scalar with a graph: sum of scale * sum over the terms
    sums: torch.Tensor  # fp32 [len(TERMS)], detached, in the order of TERMS


class StudentStep(nn.Module):
    """``adapters`` is None when distillation is off; then only the cross-entropy is computed."""

    def __init__(
        self, student: MobileVLM, adapters: AlignmentAdapters | None, distillation: DistillationSection
    ) -> None:
        super().__init__()
        self.student = student
        self.adapters = adapters
        self.divergence = distillation.divergence
        self.temperature = distillation.temperature
        self.fused_head = distillation.fused_head
        self.top_k = distillation.top_k
        self.fused_attention = distillation.fused_attention

    def sizes(self) -> ElementSizes:
        config = self.student.config
        return ElementSizes(config.num_attention_heads, config.hidden_size, config.vision_tokens, self.top_k)

    def forward(
        self,
        batch: Batch,
        scales: tuple[float, ...],
        targets: TeacherTargets | None = None,
        teacher_head_WD: torch.Tensor | None = None,
    ) -> StepOutput:
        """``scales``: factor of each term's sum (see ``losses.terms.term_scales``), all normalisation.

        Every sub-module runs whatever the batch holds: terms without elements are zeros with a graph.
        """
        consumer = None
        if targets is not None and self.adapters is not None:
            consumer = partial(self.adapters.attention, targets.block_IHMV, fused=self.fused_attention)
        outputs = self.student(batch, consumer, None if targets is None else targets.patches_IPC)
        hidden_ND = outputs.hidden_BLD.flatten(0, 1)[batch.logit_positions_N]
        logit_targets = LogitTargets(
            labels_N=batch.logit_labels_N,
            teacher_hidden_ND=None if targets is None else targets.hidden_ND,
            teacher_weight_WD=teacher_head_WD,
            divergence=self.divergence,
            temperature=self.temperature,
            fused=self.fused_head,
        )
        head: LogitLosses = self.student.head(hidden_ND, logit_targets, scales[:2])
        if targets is None or self.adapters is None:
            return StepOutput(head.loss, torch.cat([head.sums, head.sums.new_zeros(3)]))
        terms = (
            outputs.block,
            *vision_loss_sums(
                self.adapters.vision,
                targets.vision_tokens_IVD,
                outputs.vision_tokens_IVD[: batch.image_count],
                targets.focus_indices_IK,
                batch.text_rows_IM,
            ),
        )
        loss = sum((scale * term for scale, term in zip(scales[2:], terms, strict=True)), start=head.loss)
        return StepOutput(loss, torch.cat([head.sums, torch.stack([term.detach() for term in terms])]))
