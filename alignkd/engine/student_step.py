"""What the student's engine trains: student and adapters. Its forward is the loss of one micro-batch.

Shapes as in ``losses``: B rows, L columns, H heads, G key heads, E width of a head, D width, N logit
positions, W tokens of the vocabulary, I images, T heads of the teacher, M text rows, V vision tokens.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from alignkd.config.schema import DistillationSection
from alignkd.data.batch import Batch
from alignkd.losses.attention import fused_attention_loss
from alignkd.losses.fused_logits import fused_logit_losses
from alignkd.losses.logits import LogitLosses, LogitTargets
from alignkd.losses.total import ElementSizes
from alignkd.losses.vision import vision_loss_sums
from alignkd.models.adapters import AlignmentAdapters
from alignkd.models.families.interface import ModelOutputs, VisionLanguageModel
from alignkd.teacher.targets import TeacherTargets, block_layout


class StepOutput(NamedTuple):
    loss: torch.Tensor  # scalar with a graph: sum of scale * sum over the terms
    sums: torch.Tensor  # fp32 [len(TERMS)], detached, in the order of TERMS


class StudentStep(nn.Module):
    """``adapters`` is None when distillation is off; then only the cross-entropy is computed."""

    def __init__(
        self,
        student: VisionLanguageModel,
        adapters: AlignmentAdapters | None,
        distillation: DistillationSection,
    ) -> None:
        super().__init__()
        self.student = student
        self.adapters = adapters
        self.divergence = distillation.divergence
        self.temperature = distillation.temperature

    def sizes(self) -> ElementSizes:
        facts = self.student.facts
        return ElementSizes(facts.num_attention_heads, facts.hidden_size)

    def forward(
        self,
        batch: Batch,
        scales: tuple[float, ...],
        targets: TeacherTargets | None = None,
        teacher_head_WD: torch.Tensor | None = None,
    ) -> StepOutput:
        """``scales``: factor of each term's sum, see ``losses.total.term_scales``.

        Every sub-module runs whatever the batch holds: terms without elements are zeros with a graph.
        """
        outputs = self.student(batch, None if targets is None else targets.patches_IPC)
        alignment: tuple[torch.Tensor, ...] = ()
        if targets is not None and self.adapters is not None:
            # The head already holds its gradients after its forward: running this first lowers the peak.
            alignment = self._alignment_sums(self.adapters, batch, outputs, targets)
        logits = self._logit_losses(batch, outputs, targets, teacher_head_WD, (scales[0], scales[1]))
        if not alignment:
            return StepOutput(logits.loss, torch.cat([logits.sums, logits.sums.new_zeros(3)]))
        scaled = (scale * term for scale, term in zip(scales[2:], alignment, strict=True))
        detached = torch.stack([term.detach() for term in alignment])
        return StepOutput(sum(scaled, start=logits.loss), torch.cat([logits.sums, detached]))

    def _alignment_sums(
        self,
        adapters: AlignmentAdapters,
        batch: Batch,
        outputs: ModelOutputs,
        targets: TeacherTargets,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """L_A, L_V-all and L_V-focus as sums (equations 1, 4 and 3)."""
        query_BHLE, key_BGLE, scaling = outputs.first_layer
        layout = block_layout(batch, self.student.facts)
        loss_of_queries_and_keys = partial(
            fused_attention_loss,
            teacher_block_ITMV=targets.block_IHMV,
            scaling=scaling,
            layout=layout,
        )
        attention = adapters.attention(query_BHLE, key_BGLE, loss_of_queries_and_keys)
        vision_all, vision_focus = vision_loss_sums(
            adapters.vision(targets.vision_tokens_IVD.to(outputs.vision_tokens_IVD.dtype)),
            outputs.vision_tokens_IVD[: batch.image_count],
            targets.focus_indices_IK,
            batch.text_rows_IM,
            layout.filled_IV(),
        )
        return attention, vision_all, vision_focus

    def _logit_losses(
        self,
        batch: Batch,
        outputs: ModelOutputs,
        targets: TeacherTargets | None,
        teacher_head_WD: torch.Tensor | None,
        scales: tuple[float, float],
    ) -> LogitLosses:
        """L_Sup and the divergence (equation 6)."""
        logit_targets = LogitTargets(
            labels_N=batch.logit_labels_N,
            teacher_hidden_ND=None if targets is None else targets.hidden_ND,
            teacher_weight_WD=teacher_head_WD,
            divergence=self.divergence,
            temperature=self.temperature,
            softcap=self.student.facts.softcap,
            teacher_top=None if targets is None else targets.top,
        )
        hidden_ND = outputs.hidden_BLD.flatten(0, 1)[batch.logit_positions_N]
        losses: LogitLosses = self.student.head(
            hidden_ND, partial(fused_logit_losses, targets=logit_targets, scales=scales)
        )
        return losses
