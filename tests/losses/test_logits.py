"""Equation 6 in all its variants, against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from alignkd.losses.logits import Divergence, divergence_sum
from tests.losses.distributions import DIVERGENCES, HAND_COMPUTED, STUDENT, TEACHER

# Student (3/4, 1/4), teacher (1/2, 1/2), their mean (5/8, 3/8): the two directions differ.
UNEVEN = {
    "reverse_kl": 0.75 * math.log(1.5) + 0.25 * math.log(0.5),
    "forward_kl": 0.5 * math.log(2 / 3) + 0.5 * math.log(2),
    "js": 0.5
    * (0.75 * math.log(6 / 5) + 0.25 * math.log(2 / 3) + 0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3)),
}


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_hand_computed_divergences(kind: Divergence) -> None:
    assert divergence_sum(STUDENT.log(), TEACHER.log(), kind).item() == pytest.approx(HAND_COMPUTED[kind])
    student, teacher = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.5, 0.5]])
    assert divergence_sum(student.log(), teacher.log(), kind).item() == pytest.approx(UNEVEN[kind])
    rows = divergence_sum(student.log().repeat(3, 1), teacher.log().repeat(3, 1), kind).item()
    assert rows == pytest.approx(3 * UNEVEN[kind])


def test_hand_computed_constants_differ() -> None:
    assert len({round(value, 6) for value in UNEVEN.values()}) == 3


def test_js_is_symmetric_and_bounded_by_log_2() -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 3.0, 300.0):
        p, q = ((torch.randn(1, 7, generator=generator) * scale).log_softmax(-1) for _ in range(2))
        there, back = divergence_sum(p, q, "js").item(), divergence_sum(q, p, "js").item()
        assert there == pytest.approx(back, rel=1e-5)
        assert 0 < there <= math.log(2) + 1e-6
    apart = torch.tensor([[200.0, 0.0]]).log_softmax(-1), torch.tensor([[0.0, 200.0]]).log_softmax(-1)
    assert divergence_sum(*apart, "js").item() == pytest.approx(math.log(2))
