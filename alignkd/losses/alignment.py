"""L_A (equation 1), the focus score (2) and L_V (3 to 5), each a sum; who divides is the engine.

Shapes: I images, H_S / H_T heads, M text rows, V vision tokens, D_S / D_T widths, K focus tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def attention_loss_sum(
    adapter: Callable[[torch.Tensor], torch.Tensor],
    teacher_block_IHMV: torch.Tensor,
    student_block_IHMV: torch.Tensor,
    text_rows_IM: torch.Tensor,
) -> torch.Tensor:
    """Squared differences of equation 1 over valid rows (``text_rows_IM`` >= 0), in fp32, with a graph.
    ``adapter`` is called with the teacher's block as it is."""
    adapted_IMVH = adapter(teacher_block_IHMV.movedim(1, -1))
    difference = student_block_IHMV.movedim(1, -1) - adapted_IMVH
    valid_IM = (text_rows_IM >= 0)[:, :, None, None]
    squares: torch.Tensor = difference.to(_wide(difference)).square()
    return (squares * valid_IM).sum()


def vision_loss_sums(
    adapter: nn.Module,
    teacher_IVD: torch.Tensor,
    student_IVD: torch.Tensor,
    focus_indices_IK: torch.Tensor,
    text_rows_IM: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(L_V-all, L_V-focus) as sums. An image without a text row after it has no score, so no focus tokens."""
    difference = adapter(_like_weights(adapter, teacher_IVD)) - student_IVD
    squares_IV = difference.to(_wide(difference)).square().sum(dim=-1)
    has_rows_I = (text_rows_IM >= 0).any(dim=1)
    focus_sum = (squares_IV.gather(1, focus_indices_IK) * has_rows_I[:, None]).sum()
    return squares_IV.sum(), focus_sum


def focus_indices(teacher_block_IHMV: torch.Tensor, top_k: int) -> torch.Tensor:
    """Equation 2: the K vision tokens [I, K] with most attention, averaged over heads, summed over rows."""
    return teacher_block_IHMV.mean(dim=1).sum(dim=1).topk(top_k, dim=-1).indices


def _like_weights(adapter: nn.Module, value: torch.Tensor) -> torch.Tensor:
    return value.to(next(adapter.parameters()).dtype)


def _wide(value: torch.Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)
