"""Equations 2 to 4: the focus score, L_V-focus and L_V-all. Equation 5 weighs them (``losses.total``).

P_V, a 1x1 convolution over width with bias, has been applied by the caller: its output is the "adapted"
teacher. Shapes: I images, H heads of the teacher, M text rows, V vision tokens of an image, D width of the
student, K focus tokens.
"""

from __future__ import annotations

import torch

from alignkd.losses.precision import at_least_fp32


def focus_scores(teacher_block_IHMV: torch.Tensor) -> torch.Tensor:
    """Equation 2: [I, V], the attention that each vision token gets, averaged over heads and summed over text
    rows. Rows that an image does not have must be zero."""
    return teacher_block_IHMV.mean(dim=1).sum(dim=1)


def focus_indices(
    teacher_block_IHMV: torch.Tensor, top_k: int, filled_IV: torch.Tensor | None = None
) -> torch.Tensor:
    """IdxK of equation 3: int64 [I, K], the vision tokens with the highest score, per image, best first;
    of equal ones, which a map that was resampled to a finer grid has, the first.

    ``filled_IV`` says which of V an image has (None: all): the indices of an image with fewer than K end in
    some that it does not have.
    """
    scores_IV = focus_scores(teacher_block_IHMV)
    if filled_IV is not None:
        scores_IV = scores_IV.masked_fill(~filled_IV, -1.0)  # attention is never negative
    # Not topk, which may take any of equal scores.
    return scores_IV.argsort(dim=-1, descending=True, stable=True)[:, :top_k]


def vision_loss_sums(
    adapted_IVD: torch.Tensor,
    student_IVD: torch.Tensor,
    focus_indices_IK: torch.Tensor,
    text_rows_IM: torch.Tensor,
    filled_IV: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(L_V-all, L_V-focus), equations 4 and 3, as sums in fp32 (or wider) with a graph.

    An image without a text row (``text_rows_IM`` all negative) has no score and takes part in L_V-all only.
    ``filled_IV`` says which of V an image has (None: all).
    """
    difference = adapted_IVD - student_IVD
    squares_IV = difference.to(at_least_fp32(difference.dtype)).square().sum(dim=-1)
    if filled_IV is not None:
        squares_IV = squares_IV * filled_IV
    has_rows_I = (text_rows_IM >= 0).any(dim=1)
    focus_sum = (squares_IV.gather(1, focus_indices_IK) * has_rows_I[:, None]).sum()
    return squares_IV.sum(), focus_sum
