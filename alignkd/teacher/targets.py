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
    block_IHMV: torch.Tensor  # in the model's dtype
    vision_tokens_IVD: torch.Tensor
    focus_indices_IK: torch.Tensor
    patches_IPC: torch.Tensor | None = None  # of a tower that the student shares; at least one image


class TeacherModel(nn.Module):
    """A frozen model whose forward gives targets. One module, so an engine's hooks see a whole forward.

    ``shares_tower``: the student's tower is the same, so its features are handed on.
    """

    def __init__(self, model: MobileVLM, top_k: int) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.top_k = top_k
        self.shares_tower = False

    @torch.no_grad()
    def forward(self, batch: Batch) -> TeacherTargets:
        outputs = self.model(batch)
        assert outputs.block is not None
        return TeacherTargets(
            hidden_ND=outputs.hidden_BLD.flatten(0, 1)[batch.logit_positions_N],
            # Chosen from the fp32 block; what is kept is as precise as the queries and keys it came from.
            block_IHMV=outputs.block.to(outputs.hidden_BLD.dtype),
            vision_tokens_IVD=outputs.vision_tokens_IVD[: batch.image_count],
            focus_indices_IK=focus_indices(outputs.block, self.top_k),
            patches_IPC=outputs.patches_IPC if self.shares_tower else None,
        )
