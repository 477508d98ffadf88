"""The forward KL to a teacher of whom only the likeliest words are known, and one bucket for the rest.

With the teacher's probabilities p of its K likeliest words and p_rest of all others together, and the
student's q, the divergence over these K + 1 outcomes is

    sum over the K words of p (log p - log q)  +  p_rest (log p_rest - log q_rest).

Merging outcomes never adds divergence (data-processing inequality), so it is at most the forward KL over the
whole vocabulary, and equal to it when K is the vocabulary. It is also the forward KL to a distribution over
the whole vocabulary: p at the K words, and p_rest spread over the others as the student spreads q_rest. Its
gradient is that of this distribution held constant, because moving probability within the rest does not
change it. So the losses complete the teacher in this way, and compute the forward KL as always; nothing is
subtracted from 1, and no quotient can overflow.

No other divergence can be had of these words: reverse KL and Jensen-Shannon weigh by the student, and what it
does in the rest is what they are about.

Shapes: N positions, K words of each, R = K + 1 outcomes, W words of the vocabulary, D width of the teacher.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

LEAST = -1e4  # log-probability of a rest that is nothing: its exponential is 0, its product with 0 as well


class TopWords(NamedTuple):
    """The teacher's likeliest words at each position, and their log-probabilities at its temperature."""

    log_probs_NR: torch.Tensor  # floating point; the last is that of all other words together
    words_NK: torch.Tensor  # int32

    def at(self, positions: slice) -> TopWords:
        return TopWords(self.log_probs_NR[positions], self.words_NK[positions])


def top_words(log_probs_NW: torch.Tensor, count: int) -> TopWords:
    """The ``count`` likeliest of W words, the likeliest first, in the dtype of ``log_probs_NW``."""
    log_probs_NK, words_NK = log_probs_NW.topk(count, dim=-1)
    rest_N1 = log_probs_NW.scatter(1, words_NK, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return TopWords(torch.cat([log_probs_NK, rest_N1], dim=-1), words_NK.int())


def completed(top: TopWords, log_student_NW: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities [N, W] of the teacher at ``temperature``, with the rest spread as the student spreads
    it, in the dtype of ``log_student_NW``, which are the student's at temperature 1."""
    words_NK = top.words_NK.long()
    # What was rounded to be kept sums up to 1 again.
    kept_NR = top.log_probs_NR.to(log_student_NW.dtype).log_softmax(dim=-1).clamp(min=LEAST)
    others_NW = (log_student_NW / temperature).scatter_(1, words_NK, -torch.inf)
    return others_NW.log_softmax(dim=-1).add_(kept_NR[:, -1:]).scatter_(1, words_NK, kept_NR[:, :-1])
