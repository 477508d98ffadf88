"""L_Sup and the logit divergence (equation 6) from hidden states and both heads, as autograd sees them.

The plain form: what ``losses.fused_head`` gets by chunks and in closed form, and is compared with. Both
losses share the student's log-softmax. Shapes: N positions, D widths, W vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.nn import functional as F

from alignkd.data.batch import IGNORE_INDEX

Divergence = Literal["reverse_kl", "forward_kl", "js"]


@dataclass(frozen=True)
class LogitTargets:
    """What the head of the student is held against. Without a teacher only the cross-entropy is computed."""

    labels_N: torch.Tensor  # int64, IGNORE_INDEX where only the divergence applies
    teacher_hidden_ND: torch.Tensor | None = None
    teacher_weight_WD: torch.Tensor | None = None
    divergence: Divergence = "reverse_kl"
    temperature: float = 1.0
    fused: bool = True  # false: logits of all positions at once, kept for backward

    def of(self, positions: slice) -> LogitTargets:
        teacher_hidden = None if self.teacher_hidden_ND is None else self.teacher_hidden_ND[positions]
        return replace(self, labels_N=self.labels_N[positions], teacher_hidden_ND=teacher_hidden)

    def log_teacher_NW(self) -> torch.Tensor | None:
        """The teacher's log-probabilities at ``temperature``, in fp32 (or wider)."""
        if self.teacher_hidden_ND is None or self.teacher_weight_WD is None:
            return None
        return log_probabilities(self.teacher_hidden_ND, self.teacher_weight_WD, self.temperature)


def logit_loss_sums(hidden_ND: torch.Tensor, weight_WD: torch.Tensor, targets: LogitTargets) -> torch.Tensor:
    """[cross-entropy sum, divergence sum] over all positions, in fp32 (or wider).

    The divergence is summed over the vocabulary and multiplied by temperature squared.
    """
    log_student = log_probabilities(hidden_ND, weight_WD)
    ce = cross_entropy_sum(log_student, targets.labels_N)
    log_teacher = targets.log_teacher_NW()
    if log_teacher is None:
        return torch.stack([ce, ce.new_zeros(())])
    temperature = targets.temperature
    log_student = tempered(log_student, temperature)
    divergence = divergence_sum(log_student, log_teacher, targets.divergence)
    return torch.stack([ce, divergence * temperature**2])


def log_probabilities(
    hidden_ND: torch.Tensor, weight_WD: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """[N, W] in fp32 (or wider) of a product in the model's dtype."""
    logits = F.linear(hidden_ND, weight_WD)
    logits = logits.to(at_least_fp32(logits.dtype))
    return (logits if temperature == 1.0 else logits / temperature).log_softmax(dim=-1)


def tempered(log_probs_NW: torch.Tensor, temperature: float) -> torch.Tensor:
    """What the same logits give at ``temperature``: log-softmax does not see that they were normalised."""
    return log_probs_NW if temperature == 1.0 else (log_probs_NW / temperature).log_softmax(dim=-1)


def cross_entropy_sum(log_student_NW: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    return F.nll_loss(log_student_NW, labels_N, ignore_index=IGNORE_INDEX, reduction="sum")


def divergence_sum(log_student: torch.Tensor, log_teacher: torch.Tensor, kind: Divergence) -> torch.Tensor:
    """Sum over rows and vocabulary of log-probabilities [N, W].

    reverse_kl: KL(student || teacher); forward_kl: KL(teacher || student); js: half of each KL to the mean.
    """
    if kind == "reverse_kl":
        return _kl_sum(log_student, log_teacher)
    if kind == "forward_kl":
        return _kl_sum(log_teacher, log_student)
    log_mean = torch.logaddexp(log_student, log_teacher) - math.log(2.0)
    return 0.5 * (_kl_sum(log_student, log_mean) + _kl_sum(log_teacher, log_mean))


def _kl_sum(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
