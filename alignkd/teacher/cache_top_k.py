"""What a cache stores in the form ``top_k``: the teacher's K most likely tokens and their log-probabilities.

Log-probabilities are stored in fp16: it rounds them by at most 1 / 2,048 of themselves, or 3e-8, if that is
more: an eighth of bf16's error in the same two bytes, and far less than what leaving tokens out costs
(docs/cache.md).

Shapes: N positions, D the teacher's width, W tokens of the vocabulary, K tokens stored.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from alignkd.data.batch import Batch
from alignkd.losses.fused_logits import POSITIONS_PER_CHUNK
from alignkd.losses.logits import head_logits, log_probabilities
from alignkd.losses.top_tokens import top_tokens

LOG_PROBS = torch.float16


class TeacherHead(NamedTuple):
    """What the form needs to know beside hidden states."""

    weight_WD: torch.Tensor
    top_k: int  # K
    temperature: float


def to_top_k(hidden_ND: torch.Tensor, head: TeacherHead) -> dict[str, torch.Tensor]:
    """``tokens`` int32 [N, K], the most likely first, and ``log_probs`` fp16 [N, K + 1] at the temperature,
    the last of all other tokens together. Logits exist for a chunk of positions at a time."""
    found = []
    for hidden_CD in torch.split(hidden_ND, POSITIONS_PER_CHUNK):
        logits_CW = head_logits(hidden_CD, head.weight_WD)
        found.append(top_tokens(log_probabilities(logits_CW, head.temperature), head.top_k))
    return {
        "tokens": torch.cat([top.tokens_NK for top in found]),
        "log_probs": torch.cat([top.log_probs_NR for top in found]).to(LOG_PROBS),
    }


def empty_top_k(top_k: int) -> dict[str, torch.Tensor]:
    return {
        "tokens": torch.empty(0, top_k, dtype=torch.int32),
        "log_probs": torch.empty(0, top_k + 1, dtype=LOG_PROBS),
    }


def fill_top_k(batch: Batch, stored: dict[str, torch.Tensor]) -> Batch:
    return replace(batch, teacher_tokens_NK=stored["tokens"], teacher_log_probs_NR=stored["log_probs"])
