"""The losses on logits, by chunks and plain: hand-computed values, gradients, memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from alignkd.data.batch import IGNORE_INDEX
from alignkd.losses import fused_head
from alignkd.losses.fused_head import logit_losses
from alignkd.losses.logits import Divergence, LogitTargets
from benchmarks.measure import LiveBytes
from tests.losses.distributions import DIVERGENCES, HAND_COMPUTED, STUDENT, TEACHER

UNIT = (1.0, 1.0)


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


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_hand_computed_through_the_heads(kind: Divergence, fused: bool) -> None:
    """Hidden states of one number; log-probabilities as head weights give exactly those probabilities."""
    targets = LogitTargets(
        labels_N=torch.tensor([2, IGNORE_INDEX]),
        teacher_hidden_ND=torch.ones(2, 1),
        teacher_weight_WD=TEACHER.log().T,
        divergence=kind,
        fused=fused,
    )
    weight = STUDENT.log().T.requires_grad_()
    loss, sums = logit_losses(torch.ones(2, 1), weight, targets, (0.25, 3.0))
    ce, divergence = sums.tolist()
    assert ce == pytest.approx(-math.log(0.25))
    assert divergence == pytest.approx(2 * HAND_COMPUTED[kind]), "an ignored label has a divergence"
    assert loss.item() == pytest.approx(0.25 * ce + 3.0 * divergence)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_temperature_flattens_the_divergence_and_multiplies_by_its_square(
    kind: Divergence, fused: bool
) -> None:
    """At T = 2 the squares of the probabilities give the tabulated ones; the cross-entropy stays as it is."""
    targets = LogitTargets(
        torch.tensor([0]), torch.ones(1, 1), TEACHER.square().log().T, kind, temperature=2.0, fused=fused
    )
    weight = STUDENT.square().log().T.requires_grad_()
    ce, divergence = logit_losses(torch.ones(1, 1), weight, targets, UNIT).sums.tolist()
    assert divergence == pytest.approx(4 * HAND_COMPUTED[kind])
    assert ce == pytest.approx(-math.log(0.25 / (0.25 + 2 / 16)))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("chunk", [1, 5, 22, 23, 24, 512, None])
def test_chunks_equal_the_dense_losses_and_gradients(
    monkeypatch: pytest.MonkeyPatch, chunk: int | None, kind: Divergence, temperature: float
) -> None:
    """``chunk`` None: not fused, all positions at once. The last factor is what backward begins with."""
    monkeypatch.setattr(fused_head, "POSITIONS_PER_CHUNK", chunk)
    parts = problem()
    settings = {"divergence": kind, "temperature": temperature, "fused": chunk is not None}
    wanted = dense(*parts, kind, temperature)
    for ce_scale, divergence_scale, factor in ((1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (2e-3, 7e-4, 65536.0)):
        loss, sums = logit_losses(*parts[:2], targets_of(parts, **settings), (ce_scale, divergence_scale))
        assert torch.allclose(sums, wanted, rtol=1e-12)
        assert not sums.requires_grad
        wanted_loss = ce_scale * wanted[0] + divergence_scale * wanted[1]
        assert torch.allclose(loss, wanted_loss, rtol=1e-12)
        ours = torch.autograd.grad(loss * factor, parts[:2])
        theirs = torch.autograd.grad(wanted_loss * factor, parts[:2], retain_graph=True)
        for got, expected in zip(ours, theirs, strict=True):
            assert expected.abs().max() > 1e-3
            assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)


def test_without_a_teacher_there_is_only_the_cross_entropy() -> None:
    hidden, weight, labels, *_ = problem()
    loss, sums = logit_losses(hidden, weight, LogitTargets(labels), (0.5, 100.0))
    wanted = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    assert sums.tolist() == [pytest.approx(wanted.item()), 0.0]
    assert loss.item() == pytest.approx(0.5 * wanted.item())
    ours = torch.autograd.grad(loss, (hidden, weight))
    for got, expected in zip(ours, torch.autograd.grad(0.5 * wanted, (hidden, weight)), strict=True):
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_no_position_gives_zeros_with_a_graph(kind: Divergence, fused: bool) -> None:
    parts = problem(positions=0)
    loss, sums = logit_losses(*parts[:2], targets_of(parts, divergence=kind, fused=fused), UNIT)
    assert sums.tolist() == [0.0, 0.0]
    gradients = torch.autograd.grad(loss, parts[:2])
    assert [gradient.shape for gradient in gradients] == [part.shape for part in parts[:2]]
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("fused", [True, False])
def test_only_ignored_labels_give_a_finite_zero(fused: bool) -> None:
    hidden, weight, labels, *_ = problem()
    targets = LogitTargets(torch.full_like(labels, IGNORE_INDEX), fused=fused)
    loss, sums = logit_losses(hidden, weight, targets, UNIT)
    assert sums.tolist() == [0.0, 0.0]
    assert not torch.autograd.grad(loss, hidden)[0].any()


def test_zero_scales_measure_only() -> None:
    parts = problem()
    loss, sums = logit_losses(*parts[:2], targets_of(parts), (0.0, 0.0))
    assert loss.item() == 0.0
    assert sums.min() > 0
    assert not torch.autograd.grad(loss, parts[1])[0].any()


def test_without_gradients_the_sums_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_head, "POSITIONS_PER_CHUNK", 5)
    parts = problem()
    wanted = logit_losses(*parts[:2], targets_of(parts), UNIT)
    with torch.no_grad(), LiveBytes() as measured:
        loss, sums = logit_losses(*parts[:2], targets_of(parts), UNIT)
    assert not loss.requires_grad
    torch.testing.assert_close(sums, wanted.sums)
    assert measured.live == sums.nbytes + loss.nbytes, "no gradient was made"


def test_a_second_backward_is_refused() -> None:
    """The gradients are scaled in place; scaled twice they would be wrong."""
    parts = problem()
    loss, _ = logit_losses(*parts[:2], targets_of(parts), (0.5, 0.5))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_half_precision_is_summed_in_single(kind: Divergence) -> None:
    """Equal to the dense losses of the same bf16 logits in float64; a bf16 sum would be off by a percent."""
    parts = problem(positions=3000, vocabulary=50, dtype=torch.bfloat16)
    sums = logit_losses(*parts[:2], targets_of(parts, divergence=kind), UNIT).sums
    assert sums.dtype == torch.float32
    hidden, weight, labels, teacher_hidden, teacher_weight = parts
    eye = torch.eye(50, dtype=torch.float64)
    scores, teacher_scores = (
        F.linear(hidden, weight).double(),
        F.linear(teacher_hidden, teacher_weight).double(),
    )
    wanted = dense(scores, eye, labels, teacher_scores, eye, kind, 1.0)
    assert torch.allclose(sums.double(), wanted, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_half_precision_gradients(
    monkeypatch: pytest.MonkeyPatch, kind: Divergence, dtype: torch.dtype
) -> None:
    """As exact as the dtype over many chunks, however small the scales are before the loss scale."""
    monkeypatch.setattr(fused_head, "POSITIONS_PER_CHUNK", 10)
    parts = problem(positions=1000, vocabulary=50, dtype=dtype)
    scales = (1e-6, 2e-6)
    loss, _ = logit_losses(*parts[:2], targets_of(parts, divergence=kind), scales)
    ours = torch.autograd.grad(loss * 65536.0, parts[:2])
    exact = [part.detach().double() if part.is_floating_point() else part for part in parts]
    leaves = [part.requires_grad_() for part in exact[:2]]
    sums = dense(*leaves, *exact[2:], kind, 1.0)
    wanted = torch.autograd.grad((scales[0] * sums[0] + scales[1] * sums[1]) * 65536.0, leaves)
    for got, expected in zip(ours, wanted, strict=True):
        assert got.dtype == dtype
        assert (got.double() - expected).norm() < 4 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_memory_is_that_of_one_chunk(
    monkeypatch: pytest.MonkeyPatch, kind: Divergence, temperature: float
) -> None:
    """Between forward and backward there are the gradients only; at no time more than a few [C, W]."""
    monkeypatch.setattr(fused_head, "POSITIONS_PER_CHUNK", 32)
    positions, vocabulary = 256, 1000
    parts = problem(positions, vocabulary)
    matrix = vocabulary * parts[0].element_size()
    of_gradients = parts[0].nbytes + parts[1].nbytes
    matrices = 3 + (kind == "js") + (temperature != 1.0)

    def measured(**more: Any) -> tuple[int, int]:
        settings = {"divergence": kind, "temperature": temperature, **more}
        with LiveBytes() as step:
            loss, _ = logit_losses(*parts[:2], targets_of(parts, **settings), UNIT)
            kept = step.live
            torch.autograd.grad(loss, parts[:2])
        return kept, step.peak

    kept, peak = measured()
    assert of_gradients <= kept < of_gradients + 1000
    assert peak < matrices * 32 * matrix + 3 * of_gradients
    kept, _ = measured(fused=False)
    assert kept > 2 * positions * matrix, "the measure sees logits that are kept"


def test_each_chunk_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    real = fused_head.sums_and_gradient

    def counting(log_student: torch.Tensor, *others: Any) -> Any:
        rows.append(log_student.shape[0])
        return real(log_student, *others)

    monkeypatch.setattr(fused_head, "POSITIONS_PER_CHUNK", 10)
    monkeypatch.setattr(fused_head, "sums_and_gradient", counting)
    parts = problem()
    logit_losses(*parts[:2], targets_of(parts), UNIT).loss.backward()
    assert rows == [10, 10, 3]
