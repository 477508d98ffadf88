"""What a cache stores in the form ``top_k``: the teacher's likeliest words and their log-probabilities.

Log-probabilities are stored in fp16: it rounds them by at most 1 / 2,048 of themselves, an eighth of bf16's
error in the same two bytes, and far less than what leaving words out costs (docs/cache.md).

Shapes: N positions, D the teacher's width, W words of the vocabulary, K words stored.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from alignkd.data.batch import Batch
from alignkd.losses.fused_logits import POSITIONS_PER_CHUNK
from alignkd.losses.logits import head_logits, log_probabilities
from alignkd.losses.top_words import top_words

LOG_PROBS = torch.float16


class TeacherHead(NamedTuple):
    """What the form needs to know beside hidden states."""

    weight_WD: torch.Tensor
    words: int  # K
    temperature: float


def to_top_k(hidden_ND: torch.Tensor, head: TeacherHead) -> dict[str, torch.Tensor]:
    """``words`` int32 [N, K], the likeliest first, and ``log_probs`` fp16 [N, K + 1] at the temperature, the
    last of all other words together. Logits exist for a chunk of positions at a time."""
    found = []
    for hidden_CD in torch.split(hidden_ND, POSITIONS_PER_CHUNK):
        logits_CW = head_logits(hidden_CD, head.weight_WD)
        found.append(top_words(log_probabilities(logits_CW, head.temperature), head.words))
    return {
        "words": torch.cat([top.words_NK for top in found]),
        "log_probs": torch.cat([top.log_probs_NR for top in found]).to(LOG_PROBS),
    }


def empty_top_k(words: int) -> dict[str, torch.Tensor]:
    return {
        "words": torch.empty(0, words, dtype=torch.int32),
        "log_probs": torch.empty(0, words + 1, dtype=LOG_PROBS),
    }


def fill_top_k(batch: Batch, stored: dict[str, torch.Tensor]) -> Batch:
    return replace(batch, teacher_words_NK=stored["words"], teacher_log_probs_NR=stored["log_probs"])
