"""L_Sup and equation 6, the divergence of the logits, from hidden states and the weights of both heads.

This is the plain form, left to autograd: all logits at once, kept for backward. Training runs the same sums
by ``losses.fused_logits``; this one is their reference in tests and benchmarks. Both terms share the
student's log-softmax. Shapes: N positions, D width of the model at hand, W tokens of the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch.nn import functional as F

from alignkd.losses.precision import at_least_fp32
from alignkd.losses.top_tokens import TopTokens, completed

IGNORE_INDEX = -100  # label of a position without supervision
Divergence = Literal["reverse_kl", "forward_kl", "js"]
Scales = tuple[float, float]  # factors of the cross-entropy sum and of the divergence sum


@dataclass(frozen=True)
class LogitTargets:
    """What the student's logits are compared with: the teacher's hidden states and head, or its most
    likely tokens, for the forward KL only (ValueError). Without a teacher the divergence is zero."""

    labels_N: torch.Tensor  # int64, IGNORE_INDEX where only the divergence applies
    teacher_hidden_ND: torch.Tensor | None = None
    teacher_weight_WD: torch.Tensor | None = None
    divergence: Divergence = "reverse_kl"
    temperature: float = 1.0
    softcap: float | None = None  # of both models' logits x: softcap * tanh(x / softcap)
    teacher_top: TopTokens | None = None  # at ``temperature``; hidden states and head are then not looked at

    def __post_init__(self) -> None:
        if self.teacher_top is not None and self.divergence != "forward_kl":
            raise ValueError(f"teacher_top is for divergence = forward_kl only, not for {self.divergence}")

    def at(self, positions: slice) -> LogitTargets:
        """The targets of some of the positions."""
        teacher_hidden = None if self.teacher_hidden_ND is None else self.teacher_hidden_ND[positions]
        top = None if self.teacher_top is None else self.teacher_top.at(positions)
        labels = self.labels_N[positions]
        return replace(self, labels_N=labels, teacher_hidden_ND=teacher_hidden, teacher_top=top)

    def log_teacher_NW(self, log_student_NW: torch.Tensor) -> torch.Tensor | None:
        """The teacher's log-probabilities at ``temperature``, in fp32 (or wider), a constant to autograd.
        ``log_student_NW``: the student's at temperature 1, for what ``losses.top_tokens`` needs of them."""
        if self.teacher_top is not None:
            return completed(self.teacher_top, log_student_NW.detach(), self.temperature)
        if self.teacher_hidden_ND is None or self.teacher_weight_WD is None:
            return None
        logits = head_logits(self.teacher_hidden_ND, self.teacher_weight_WD, self.softcap)
        return log_probabilities(logits, self.temperature)


class LogitLosses(NamedTuple):
    loss: torch.Tensor  # scalar with a graph, even when N is 0: the sums times their scales
    sums: torch.Tensor  # [cross-entropy, divergence], detached, in fp32 (or wider)


def plain_logit_losses(
    hidden_ND: torch.Tensor, weight_WD: torch.Tensor, *, targets: LogitTargets, scales: Scales
) -> LogitLosses:
    """Same arguments and result as ``fused_logits.fused_logit_losses``."""
    sums = logit_loss_sums(hidden_ND, weight_WD, targets)
    return LogitLosses(scaled(sums, scales), sums.detach())


def logit_loss_sums(hidden_ND: torch.Tensor, weight_WD: torch.Tensor, targets: LogitTargets) -> torch.Tensor:
    """[cross-entropy sum, divergence sum] over all positions, in fp32 (or wider).

    The divergence is summed over the vocabulary and multiplied by temperature squared.
    """
    log_student = log_probabilities(head_logits(hidden_ND, weight_WD, targets.softcap))
    ce = cross_entropy_sum(log_student, targets.labels_N)
    log_teacher = targets.log_teacher_NW(log_student)
    if log_teacher is None:
        return torch.stack([ce, ce.new_zeros(())])
    temperature = targets.temperature
    divergence = divergence_sum(tempered(log_student, temperature), log_teacher, targets.divergence)
    return torch.stack([ce, divergence * temperature**2])


def head_logits(
    hidden_ND: torch.Tensor, weight_WD: torch.Tensor, softcap: float | None = None
) -> torch.Tensor:
    """[N, W] in fp32 (or wider) of a product in the model's dtype."""
    logits = F.linear(hidden_ND, weight_WD)
    logits = logits.to(at_least_fp32(logits.dtype))
    return logits if softcap is None else (logits / softcap).tanh() * softcap


def log_probabilities(logits_NW: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """[N, W] at ``temperature``."""
    return (logits_NW if temperature == 1.0 else logits_NW / temperature).log_softmax(dim=-1)


def tempered(log_probs_NW: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities of the same logits at ``temperature``. Logits may be shifted by a constant, so those
    at temperature 1 serve as logits."""
    return log_probs_NW if temperature == 1.0 else (log_probs_NW / temperature).log_softmax(dim=-1)


def cross_entropy_sum(log_student_NW: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """L_Sup as a sum over the positions whose label is not IGNORE_INDEX."""
    return F.nll_loss(log_student_NW, labels_N, ignore_index=IGNORE_INDEX, reduction="sum")


def divergence_sum(
    log_student_NW: torch.Tensor, log_teacher_NW: torch.Tensor, kind: Divergence
) -> torch.Tensor:
    """Equation 6 summed over positions and vocabulary.

    reverse_kl: KL(student || teacher), the paper's; forward_kl: KL(teacher || student); js: half the KL of
    each to their mean.
    """
    if kind == "reverse_kl":
        return _kl_sum(log_student_NW, log_teacher_NW)
    if kind == "forward_kl":
        return _kl_sum(log_teacher_NW, log_student_NW)
    log_mean_NW = torch.logaddexp(log_student_NW, log_teacher_NW) - math.log(2.0)
    return 0.5 * (_kl_sum(log_student_NW, log_mean_NW) + _kl_sum(log_teacher_NW, log_mean_NW))


def scaled(sums: torch.Tensor, scales: Scales) -> torch.Tensor:
    """The weighted total of both sums."""
    return scales[0] * sums[0] + scales[1] * sums[1]


def _kl_sum(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q)."""
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)
