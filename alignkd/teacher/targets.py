"""What the losses need of the teacher, and nothing else: compact, per micro-batch, movable."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from alignkd.data.batch import Batch
from alignkd.losses.alignment import focus_indices
from alignkd.models.mobilevlm import MobileVLM


class TeacherTargets(NamedTuple):
    """N logit positions, I real images, H heads, M text rows, V vision tokens, K focus tokens."""

    hidden_ND: torch.Tensor  # at the batch's logit positions; the head comes later, in chunks
    block_IHMV: torch.Tensor
    vision_tokens_IVD: torch.Tensor
    focus_indices_IK: torch.Tensor


class TeacherModel(nn.Module):
    """A frozen model whose forward gives targets. One module, so an engine's hooks see a whole forward."""

    def __init__(self, model: MobileVLM, top_k: int) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.top_k = top_k

    @torch.no_grad()
    def forward(self, batch: Batch) -> TeacherTargets:
        outputs = self.model(batch, collect_block=True)
        return TeacherTargets(
            hidden_ND=outputs.hidden_BLD.flatten(0, 1)[batch.logit_positions_N],
            block_IHMV=outputs.block_IHMV,
            vision_tokens_IVD=outputs.vision_tokens_IVD[: batch.image_count],
            focus_indices_IK=focus_indices(outputs.block_IHMV, self.top_k),
        )
