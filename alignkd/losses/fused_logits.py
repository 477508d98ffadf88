"""L_Sup and equation 6 with the heads fused in: logits exist for one chunk of positions at a time, once.

While the logits of a chunk exist, the gradient of the weighted loss with respect to them is computed and
multiplied out; backward only scales it (the method of Liger-Kernel's fused linear cross-entropy, arXiv
2410.10989). The gradient is written out instead of left to autograd, which takes fewer passes over the
vocabulary and three matrices of a chunk at a time instead of seven. Shapes as in ``losses.logits``; C
positions of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from alignkd.losses.logits import (
    IGNORE_INDEX,
    Divergence,
    LogitLosses,
    LogitTargets,
    Scales,
    cross_entropy_sum,
    head_logits,
    log_probabilities,
    logit_loss_sums,
    scaled,
    tempered,
)
from alignkd.losses.precision import at_least_fp32

POSITIONS_PER_CHUNK = 512


def fused_logit_losses(
    hidden_ND: torch.Tensor, weight_WD: torch.Tensor, *, targets: LogitTargets, scales: Scales
) -> LogitLosses:
    """``scales`` hold all weights and normalisation, because the gradient is computed here, before any
    backward."""
    if torch.is_grad_enabled():
        return LogitLosses(*_FusedLogitLosses.apply(hidden_ND, weight_WD, targets, scales))  # type: ignore[no-untyped-call]
    sums = [logit_loss_sums(hidden_ND[part], weight_WD, targets.at(part)) for part in _parts(len(hidden_ND))]
    total = torch.stack(sums).sum(dim=0)
    return LogitLosses(scaled(total, scales), total)


class _FusedLogitLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, weight_WD: torch.Tensor, targets: LogitTargets, scales: Scales
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The common factor, 1 / count, would push small probabilities below the range of fp16: backward
        # applies it.
        unit = max(map(abs, scales)) or 1.0
        relative = (scales[0] / unit, scales[1] / unit)
        wide = at_least_fp32(hidden_ND.dtype)
        sums = hidden_ND.new_zeros(2, dtype=wide)
        d_hidden, d_weight = torch.empty_like(hidden_ND, dtype=wide), None
        for part in _parts(len(hidden_ND)):
            hidden_CD = hidden_ND[part]
            logits = head_logits(hidden_CD, weight_WD, targets.softcap)
            slope = None if targets.softcap is None else 1.0 - (logits / targets.softcap).square()
            log_student = log_probabilities(logits)
            del logits
            chunk_sums, d_logits = sums_and_gradient(log_student, targets.at(part), relative)
            del log_student
            sums += chunk_sums
            if slope is not None:
                d_logits.mul_(slope)
                del slope
            d_logits = d_logits.to(weight_WD.dtype)
            d_hidden[part] = d_logits @ weight_WD
            if ctx.needs_input_grad[1]:  # not of a frozen head
                d_weight = _add_product(d_weight, d_logits.T, hidden_CD)
            del d_logits  # before the next chunk's is made
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(sums)
        ctx.unit, ctx.dtypes = unit, (hidden_ND.dtype, weight_WD.dtype)
        return scaled(sums, scales), sums

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        factor = gradient * ctx.unit
        # In place, to save memory; autograd then refuses a second backward.
        d_hidden = d_hidden.mul_(factor).to(hidden_dtype)
        return d_hidden, None if d_weight is None else d_weight.mul_(factor).to(weight_dtype), None, None


def sums_and_gradient(
    log_student_CW: torch.Tensor, targets: LogitTargets, scales: Scales
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums [2] of ``logit_loss_sums``, and the gradient [C, W] of their weighted total with respect to
    the student's logits. ``log_student_CW``: its log-probabilities at temperature 1."""
    ce = cross_entropy_sum(log_student_CW, targets.labels_N)
    is_label_C1 = (targets.labels_N != IGNORE_INDEX).to(log_student_CW)[:, None]
    log_teacher = targets.log_teacher_NW(log_student_CW)
    temperature = targets.temperature
    if log_teacher is None:
        divergence = ce.new_zeros(())
        gradient = log_student_CW.exp().mul_(scales[0] * is_label_C1)
    else:
        log_tempered = tempered(log_student_CW, temperature)
        divergence, gradient, student = divergence_and_gradient(log_tempered, log_teacher, targets.divergence)
        if temperature != 1.0:
            student = torch.exp(log_student_CW, out=student)
        # Logits are divided by the temperature, the divergence is multiplied by its square.
        gradient.mul_(scales[1] * temperature).addcmul_(student, scales[0] * is_label_C1)
    gradient.scatter_add_(1, targets.labels_N.clamp(min=0)[:, None], -scales[0] * is_label_C1)
    return torch.stack([ce, divergence * temperature**2]), gradient


def divergence_and_gradient(
    log_p_CW: torch.Tensor, log_q_CW: torch.Tensor, kind: Divergence
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``divergence_sum`` of student p and teacher q, its gradient with respect to p's logits, and p.

    Overwrites ``log_q_CW``. With f = d divergence / d p, the gradient is p (f - sum over the vocabulary of
    p f).
    """
    if kind == "forward_kl":  # f = - q / p
        q = log_q_CW.exp()
        divergence = log_q_CW.sub_(log_p_CW).mul_(q).sum()
        p = torch.exp(log_p_CW, out=log_q_CW)
        return divergence, torch.sub(p, q, out=q), p
    if kind == "reverse_kl":  # f = log p - log q + 1; the constant cancels
        f = log_q_CW.neg_().add_(log_p_CW)
        p = log_p_CW.exp()
        p_f = f.mul_(p)
        rows_C1 = p_f.sum(dim=-1, keepdim=True)
        return rows_C1.sum(), p_f.addcmul_(p, rows_C1, value=-1.0), p
    log_m = torch.logaddexp(log_p_CW, log_q_CW).sub_(math.log(2.0))
    q = log_q_CW.exp()
    q_part = log_q_CW.sub_(log_m).mul_(q).sum()
    p = torch.exp(log_p_CW, out=q)
    p_f = log_m.neg_().add_(log_p_CW).mul_(p)  # f = (log p - log m) / 2
    rows_C1 = p_f.sum(dim=-1, keepdim=True)
    return 0.5 * (rows_C1.sum() + q_part), p_f.addcmul_(p, rows_C1, value=-1.0).mul_(0.5), p


def _parts(positions: int) -> Iterator[slice]:
    """Chunks of positions; an empty one when there is none, so that the weight is in every rank's graph."""
    starts = range(0, max(positions, 1), POSITIONS_PER_CHUNK)
    return (slice(start, start + POSITIONS_PER_CHUNK) for start in starts)


def _add_product(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``total`` + ``left`` @ ``right``, summed in fp32 (or wider), with as few temporaries as possible."""
    if total is None:
        product = left @ right
        return product.to(at_least_fp32(product.dtype))
    if total.dtype == left.dtype:
        return total.addmm_(left, right)
    return total.add_(left @ right)
