"""Two distributions over three words, and their divergences by hand."""

from __future__ import annotations

import math

import torch

from alignkd.losses.logits import Divergence

DIVERGENCES: tuple[Divergence, ...] = ("reverse_kl", "forward_kl", "js")
# Student (1/2, 1/4, 1/4), teacher (1/4, 1/4, 1/2), their mean (3/8, 1/4, 3/8).
STUDENT, TEACHER = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
HAND_COMPUTED = {
    "reverse_kl": 0.5 * math.log(2) - 0.25 * math.log(2),
    "forward_kl": 0.5 * math.log(2) - 0.25 * math.log(2),
    "js": 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3),
}
