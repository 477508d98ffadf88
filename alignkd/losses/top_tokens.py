"""Forward KL from the teacher's K most likely tokens plus the probability of the rest.

With the teacher's probabilities p of these tokens and p_rest of all others together, and the student's q,
the divergence over these K + 1 outcomes is

    sum over the K tokens of p (log p - log q)  +  p_rest (log p_rest - log q_rest).

Merging outcomes never adds divergence (data-processing inequality), so it is at most the forward KL over the
whole vocabulary, and equal to it when K is the vocabulary. It is also the forward KL to a distribution over
the whole vocabulary: p at the K tokens, and p_rest spread over the others as the student spreads q_rest. Its
gradient is that of this distribution held constant, because moving probability within the rest does not
change it. So the losses complete the teacher in this way, and compute the forward KL as always; nothing is
subtracted from 1, and no quotient can overflow.

Reverse KL and Jensen-Shannon cannot be computed from these tokens: they weight by the student's
probabilities, so they depend on how the teacher spreads the rest.

Shapes: N positions, K tokens of each, R = K + 1 outcomes, W tokens of the vocabulary, D width of the teacher.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

LEAST = -1e4  # log-probability of a rest of probability 0: its exponential is 0, and so is their product


class TopTokens(NamedTuple):
    """The teacher's most likely tokens at each position, and their log-probabilities at its temperature."""

    log_probs_NR: torch.Tensor  # floating point; the last is that of all other tokens together
    tokens_NK: torch.Tensor  # int32

    def at(self, positions: slice) -> TopTokens:
        return TopTokens(self.log_probs_NR[positions], self.tokens_NK[positions])


def top_tokens(log_probs_NW: torch.Tensor, count: int) -> TopTokens:
    """The ``count`` most likely tokens of W, the most likely first, in the dtype of ``log_probs_NW``."""
    log_probs_NK, tokens_NK = log_probs_NW.topk(count, dim=-1)
    rest_N1 = log_probs_NW.scatter(1, tokens_NK, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return TopTokens(torch.cat([log_probs_NK, rest_N1], dim=-1), tokens_NK.int())


def completed(top: TopTokens, log_student_NW: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities [N, W] of the teacher at ``temperature``, with the rest spread as the student spreads
    it, in the dtype of ``log_student_NW``, which are the student's at temperature 1."""
    tokens_NK = top.tokens_NK.long()
    # What was rounded to be kept sums up to 1 again.
    kept_NR = top.log_probs_NR.to(log_student_NW.dtype).log_softmax(dim=-1).clamp(min=LEAST)
    others_NW = (log_student_NW / temperature).scatter_(1, tokens_NK, -torch.inf)
    return others_NW.log_softmax(dim=-1).add_(kept_NR[:, -1:]).scatter_(1, tokens_NK, kept_NR[:, :-1])
