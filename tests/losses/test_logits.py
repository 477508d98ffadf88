"""The fused logit losses: hand-computed values, chunks, memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from alignkd.data.batch import IGNORE_INDEX
from alignkd.losses import logits
from alignkd.losses.logits import Divergence, LogitTargets, divergence_sum, logit_loss_sums

DIVERGENCES: tuple[Divergence, ...] = ("reverse_kl", "forward_kl", "js")
# Student (1/2, 1/4, 1/4), teacher (1/4, 1/4, 1/2), their mean (3/8, 1/4, 3/8).
STUDENT, TEACHER = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
HAND_COMPUTED = {
    "reverse_kl": 0.5 * math.log(2) - 0.25 * math.log(2),
    "forward_kl": 0.5 * math.log(2) - 0.25 * math.log(2),
    "js": 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3),
}
# Student (3/4, 1/4), teacher (1/2, 1/2), their mean (5/8, 3/8): the two directions differ.
UNEVEN = {
    "reverse_kl": 0.75 * math.log(1.5) + 0.25 * math.log(0.5),
    "forward_kl": 0.5 * math.log(2 / 3) + 0.5 * math.log(2),
    "js": 0.5
    * (0.75 * math.log(6 / 5) + 0.25 * math.log(2 / 3) + 0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3)),
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
) -> torch.Tensor:
    """The same from whole [N, vocabulary] probabilities, written out."""
    scores, teacher_scores = hidden @ weight.T, teacher_hidden @ teacher_weight.T
    ce = F.cross_entropy(scores, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    p, q = (scores / temperature).softmax(-1), (teacher_scores / temperature).softmax(-1)
    m = (p + q) / 2
    divergence = {
        "reverse_kl": (p * (p / q).log()).sum(),
        "forward_kl": (q * (q / p).log()).sum(),
        "js": ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2,
    }[kind]
    return torch.stack([ce, divergence * temperature**2])


def targets_of(parts: tuple[torch.Tensor, ...], **settings: Any) -> LogitTargets:
    return LogitTargets(parts[2], parts[3], parts[4], **settings)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_hand_computed_divergences(kind: Divergence) -> None:
    assert divergence_sum(STUDENT.log(), TEACHER.log(), kind).item() == pytest.approx(HAND_COMPUTED[kind])
    student, teacher = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.5, 0.5]])
    assert divergence_sum(student.log(), teacher.log(), kind).item() == pytest.approx(UNEVEN[kind])
    rows = divergence_sum(student.log().repeat(3, 1), teacher.log().repeat(3, 1), kind).item()
    assert rows == pytest.approx(3 * UNEVEN[kind])


def test_hand_computed_constants_differ() -> None:
    assert len({round(value, 6) for value in UNEVEN.values()}) == 3


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_hand_computed_through_the_heads(kind: Divergence) -> None:
    """Hidden states of one number; log-probabilities as head weights give exactly those probabilities."""
    targets = LogitTargets(
        labels_N=torch.tensor([2, IGNORE_INDEX]),
        teacher_hidden_ND=torch.ones(2, 1),
        teacher_weight_WD=TEACHER.log().T,
        divergence=kind,
    )
    ce, divergence = logit_loss_sums(torch.ones(2, 1), STUDENT.log().T, targets).tolist()
    assert ce == pytest.approx(-math.log(0.25))
    assert divergence == pytest.approx(2 * HAND_COMPUTED[kind]), "an ignored label has a divergence"


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_temperature_flattens_the_divergence_and_multiplies_by_its_square(kind: Divergence) -> None:
    """At T = 2 the squares of the probabilities give the tabulated ones; the cross-entropy stays as it is."""
    targets = LogitTargets(
        torch.tensor([0]), torch.ones(1, 1), TEACHER.square().log().T, kind, temperature=2.0
    )
    ce, divergence = logit_loss_sums(torch.ones(1, 1), STUDENT.square().log().T, targets).tolist()
    assert divergence == pytest.approx(4 * HAND_COMPUTED[kind])
    assert ce == pytest.approx(-math.log(0.25 / (0.25 + 2 / 16)))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("chunk", [1, 5, 22, 23, 24, 512, None])
def test_chunks_equal_the_dense_losses_and_gradients(
    monkeypatch: pytest.MonkeyPatch, chunk: int | None, kind: Divergence, temperature: float
) -> None:
    """``chunk`` None: not fused, all positions at once."""
    monkeypatch.setattr(logits, "POSITIONS_PER_CHUNK", chunk)
    parts = problem()
    settings = {"divergence": kind, "temperature": temperature, "fused": chunk is not None}
    fused = logit_loss_sums(*parts[:2], targets_of(parts, **settings))
    wanted = dense(*parts, kind, temperature)
    assert torch.allclose(fused, wanted, rtol=1e-12)
    for number in (0, 1):
        ours = torch.autograd.grad(fused[number], parts[:2], retain_graph=True)
        theirs = torch.autograd.grad(wanted[number], parts[:2], retain_graph=True)
        for got, expected in zip(ours, theirs, strict=True):
            assert expected.abs().max() > 1e-3
            assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)


def test_without_a_teacher_there_is_only_the_cross_entropy() -> None:
    hidden, weight, labels, *_ = problem()
    ce, divergence = logit_loss_sums(hidden, weight, LogitTargets(labels))
    assert ce.item() == pytest.approx(F.cross_entropy(hidden @ weight.T, labels, reduction="sum").item())
    assert divergence.item() == 0.0


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_no_position_gives_zeros_with_a_graph(kind: Divergence) -> None:
    parts = problem(positions=0)
    sums = logit_loss_sums(*parts[:2], targets_of(parts, divergence=kind))
    assert sums.tolist() == [0.0, 0.0]
    gradients = torch.autograd.grad(sums.sum(), parts[:2])
    assert not any(gradient.any() for gradient in gradients)


def test_only_ignored_labels_give_a_finite_zero() -> None:
    hidden, weight, labels, *_ = problem()
    sums = logit_loss_sums(hidden, weight, LogitTargets(torch.full_like(labels, IGNORE_INDEX)))
    assert sums.tolist() == [0.0, 0.0]
    assert not torch.autograd.grad(sums[0], hidden)[0].any()


def test_js_is_symmetric_and_bounded_by_log_2() -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 3.0, 300.0):
        p, q = ((torch.randn(1, 7, generator=generator) * scale).log_softmax(-1) for _ in range(2))
        there, back = divergence_sum(p, q, "js").item(), divergence_sum(q, p, "js").item()
        assert there == pytest.approx(back, rel=1e-5)
        assert 0 < there <= math.log(2) + 1e-6
    apart = torch.tensor([[200.0, 0.0]]).log_softmax(-1), torch.tensor([[0.0, 200.0]]).log_softmax(-1)
    assert divergence_sum(*apart, "js").item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_half_precision_is_summed_in_single(kind: Divergence) -> None:
    """Equal to the dense losses of the same bf16 logits in float64; a bf16 sum would be off by a percent."""
    parts = problem(positions=3000, vocabulary=50, dtype=torch.bfloat16)
    sums = logit_loss_sums(*parts[:2], targets_of(parts, divergence=kind))
    assert sums.dtype == torch.float32
    hidden, weight, labels, teacher_hidden, teacher_weight = parts
    eye = torch.eye(50, dtype=torch.float64)
    scores, teacher_scores = (
        F.linear(hidden, weight).double(),
        F.linear(teacher_hidden, teacher_weight).double(),
    )
    wanted = dense(scores, eye, labels, teacher_scores, eye, kind, 1.0)
    assert torch.allclose(sums.double(), wanted, rtol=1e-4)


def kept_elements(compute: Any) -> int:
    """Elements of all tensors that autograd keeps for the backward of what ``compute`` returns."""
    kept: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes() // value.element_size()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        result = compute()
    assert result.requires_grad
    return sum(kept.values())


def test_nothing_of_the_size_of_the_logits_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "POSITIONS_PER_CHUNK", 32)
    positions, vocabulary = 256, 1000
    parts = problem(positions, vocabulary)
    settings = {"divergence": "reverse_kl", "temperature": 2.0}
    fused = kept_elements(lambda: logit_loss_sums(*parts[:2], targets_of(parts, **settings)))
    whole = kept_elements(lambda: logit_loss_sums(*parts[:2], targets_of(parts, **settings, fused=False)))
    assert whole > 3 * positions * vocabulary, "the measure sees logits that are kept"
    assert fused < 0.1 * positions * vocabulary


def test_one_chunk_at_a_time_is_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    real = logits.divergence_sum

    def counting(log_student: torch.Tensor, log_teacher: torch.Tensor, kind: Divergence) -> torch.Tensor:
        rows.append(log_student.shape[0])
        return real(log_student, log_teacher, kind)

    monkeypatch.setattr(logits, "POSITIONS_PER_CHUNK", 10)
    monkeypatch.setattr(logits, "divergence_sum", counting)
    parts = problem()
    sums = logit_loss_sums(*parts[:2], targets_of(parts))
    assert rows == [10, 10, 3]
    sums.sum().backward()
    assert rows == [10, 10, 3, 3, 10, 10]
