"""Two distributions over three words with their divergences by hand; random heads with dense losses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from alignkd.losses.logits import IGNORE_INDEX, Divergence

DIVERGENCES: tuple[Divergence, ...] = ("reverse_kl", "forward_kl", "js")
# Student (1/2, 1/4, 1/4), teacher (1/4, 1/4, 1/2), their mean (3/8, 1/4, 3/8).
STUDENT, TEACHER = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
HAND_COMPUTED = {
    "reverse_kl": 0.5 * math.log(2) - 0.25 * math.log(2),
    "forward_kl": 0.5 * math.log(2) - 0.25 * math.log(2),
    "js": 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3),
}


def problem(
    positions: int = 23, vocabulary: int = 11, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(student hidden, student weight, labels, teacher hidden, teacher weight), every third label ignored."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(0, vocabulary, (positions,), generator=generator)
    labels[::3] = IGNORE_INDEX
    hidden, weight = draw(positions, 4).requires_grad_(), draw(vocabulary, 4).requires_grad_()
    return hidden, weight, labels, draw(positions, 6), draw(vocabulary, 6)


def dense(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    kind: Divergence,
    temperature: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """The same from whole [N, vocabulary] probabilities, written out."""
    scores, teacher_scores = hidden @ weight.T, teacher_hidden @ teacher_weight.T
    if softcap is not None:
        scores, teacher_scores = (softcap * torch.tanh(x / softcap) for x in (scores, teacher_scores))
    ce = F.cross_entropy(scores, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    p, q = (scores / temperature).softmax(-1), (teacher_scores / temperature).softmax(-1)
    m = (p + q) / 2
    divergence = {
        "reverse_kl": (p * (p / q).log()).sum(),
        "forward_kl": (q * (q / p).log()).sum(),
        "js": ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2,
    }[kind]
    return torch.stack([ce, divergence * temperature**2])


def assert_same_loss_and_gradients(
    loss: torch.Tensor, wanted: torch.Tensor, inputs: Sequence[torch.Tensor], factor: float
) -> None:
    """In float64; ``factor``: of both losses in the backward, as a loss scale. ``wanted`` keeps its graph."""
    assert torch.allclose(loss, wanted, rtol=1e-12)
    ours = torch.autograd.grad(loss * factor, inputs)
    theirs = torch.autograd.grad(wanted * factor, inputs, retain_graph=True)
    for got, expected in zip(ours, theirs, strict=True):
        assert expected.abs().max() > 1e-3
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)
