"""L_Sup and the logit divergence (equation 6), fused with both heads.

Logits exist for one chunk of positions at a time, in forward and, recomputed, in backward. Both losses share
the student's log-softmax. Shapes: N positions, D widths, W vocabulary, C positions of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from alignkd.data.batch import IGNORE_INDEX

Divergence = Literal["reverse_kl", "forward_kl", "js"]
POSITIONS_PER_CHUNK = 512


@dataclass(frozen=True)
class LogitTargets:
    """What the head of the student is held against. Without a teacher only the cross-entropy is computed."""

    labels_N: torch.Tensor  # int64, IGNORE_INDEX where only the divergence applies
    teacher_hidden_ND: torch.Tensor | None = None
    teacher_weight_WD: torch.Tensor | None = None
    divergence: Divergence = "reverse_kl"
    temperature: float = 1.0
    fused: bool = True  # false: logits of all positions at once, kept for backward


def logit_loss_sums(hidden_ND: torch.Tensor, weight_WD: torch.Tensor, targets: LogitTargets) -> torch.Tensor:
    """[cross-entropy sum, divergence sum] over all positions, in fp32, with a graph even when N is 0.

    The divergence is summed over the vocabulary and multiplied by temperature squared.
    """
    if not targets.fused:
        return _chunk_losses(hidden_ND, weight_WD, targets.labels_N, targets.teacher_hidden_ND, targets)
    sums: torch.Tensor | None = None
    # At least one chunk, be it empty: the weight takes part in the graph on every rank.
    for start in range(0, max(hidden_ND.shape[0], 1), POSITIONS_PER_CHUNK):
        part = slice(start, start + POSITIONS_PER_CHUNK)
        teacher_hidden = None if targets.teacher_hidden_ND is None else targets.teacher_hidden_ND[part]
        args = (hidden_ND[part], weight_WD, targets.labels_N[part], teacher_hidden, targets)
        if torch.is_grad_enabled():
            chunk = checkpoint(_chunk_losses, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            chunk = _chunk_losses(*args)
        sums = chunk if sums is None else sums + chunk
    assert sums is not None
    return sums


def _chunk_losses(
    hidden_CD: torch.Tensor,
    weight_WD: torch.Tensor,
    labels_C: torch.Tensor,
    teacher_hidden_CD: torch.Tensor | None,
    targets: LogitTargets,
) -> torch.Tensor:
    logits = _wide(F.linear(hidden_CD, weight_WD))
    log_student = logits.log_softmax(dim=-1)
    ce = F.nll_loss(log_student, labels_C, ignore_index=IGNORE_INDEX, reduction="sum")
    if teacher_hidden_CD is None or targets.teacher_weight_WD is None:
        return torch.stack([ce, ce.new_zeros(())])
    temperature = targets.temperature
    teacher_logits = _wide(F.linear(teacher_hidden_CD, targets.teacher_weight_WD))
    if temperature != 1.0:
        log_student = (logits / temperature).log_softmax(dim=-1)
        teacher_logits = teacher_logits / temperature
    divergence = divergence_sum(log_student, teacher_logits.log_softmax(dim=-1), targets.divergence)
    return torch.stack([ce, divergence * temperature**2])


def divergence_sum(log_student: torch.Tensor, log_teacher: torch.Tensor, kind: Divergence) -> torch.Tensor:
    """Sum over rows and vocabulary of log-probabilities [C, W].

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


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
