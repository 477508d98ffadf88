"""The losses on logits, fused and plain: hand-computed values, gradients, memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from alignkd.losses import fused_logits
from alignkd.losses.fused_logits import fused_logit_losses
from alignkd.losses.logits import IGNORE_INDEX, Divergence, LogitLosses, LogitTargets, plain_logit_losses
from benchmarks.measure import LiveBytes
from tests.losses.distributions import (
    DIVERGENCES,
    HAND_COMPUTED,
    STUDENT,
    TEACHER,
    assert_same_loss_and_gradients,
    dense,
    problem,
)

UNIT = (1.0, 1.0)
FORMS = (fused_logit_losses, plain_logit_losses)


def targets_of(parts: tuple[torch.Tensor, ...], **settings: Any) -> LogitTargets:
    return LogitTargets(parts[2], parts[3], parts[4], **settings)


def fused(parts: tuple[torch.Tensor, ...], targets: LogitTargets, scales: tuple[float, float]) -> LogitLosses:
    return fused_logit_losses(parts[0], parts[1], targets=targets, scales=scales)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_hand_computed_through_the_heads(kind: Divergence, form: Any) -> None:
    """Hidden states of one number; log-probabilities as head weights give exactly those probabilities."""
    targets = LogitTargets(
        labels_N=torch.tensor([2, IGNORE_INDEX]),
        teacher_hidden_ND=torch.ones(2, 1),
        teacher_weight_WD=TEACHER.log().T,
        divergence=kind,
    )
    weight = STUDENT.log().T.requires_grad_()
    loss, sums = form(torch.ones(2, 1), weight, targets=targets, scales=(0.25, 3.0))
    ce, divergence = sums.tolist()
    assert ce == pytest.approx(-math.log(0.25))
    assert divergence == pytest.approx(2 * HAND_COMPUTED[kind]), "an ignored label has a divergence"
    assert loss.item() == pytest.approx(0.25 * ce + 3.0 * divergence)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_temperature_flattens_the_divergence_and_multiplies_by_its_square(
    kind: Divergence, form: Any
) -> None:
    """At T = 2 the squares of the probabilities give the tabulated ones; the cross-entropy stays as it is."""
    targets = LogitTargets(
        torch.tensor([0]), torch.ones(1, 1), TEACHER.square().log().T, kind, temperature=2.0
    )
    weight = STUDENT.square().log().T.requires_grad_()
    ce, divergence = form(torch.ones(1, 1), weight, targets=targets, scales=UNIT).sums.tolist()
    assert divergence == pytest.approx(4 * HAND_COMPUTED[kind])
    assert ce == pytest.approx(-math.log(0.25 / (0.25 + 2 / 16)))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("chunk", [1, 5, 22, 23, 24, 512, None])
def test_chunks_equal_the_dense_losses_and_gradients(
    monkeypatch: pytest.MonkeyPatch, chunk: int | None, kind: Divergence, temperature: float
) -> None:
    """``chunk`` None: the plain form. The last factor is the gradient that backward starts from."""
    monkeypatch.setattr(fused_logits, "POSITIONS_PER_CHUNK", chunk)
    form = fused_logit_losses if chunk is not None else plain_logit_losses
    parts = problem()
    targets = targets_of(parts, divergence=kind, temperature=temperature)
    wanted = dense(*parts, kind, temperature)
    for ce_scale, divergence_scale, factor in ((1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (2e-3, 7e-4, 65536.0)):
        loss, sums = form(*parts[:2], targets=targets, scales=(ce_scale, divergence_scale))
        assert torch.allclose(sums, wanted, rtol=1e-12)
        assert not sums.requires_grad
        wanted_loss = ce_scale * wanted[0] + divergence_scale * wanted[1]
        assert_same_loss_and_gradients(loss, wanted_loss, parts[:2], factor)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("form", FORMS)
def test_capped_logits_equal_the_dense_losses_and_gradients(
    monkeypatch: pytest.MonkeyPatch, form: Any, kind: Divergence
) -> None:
    monkeypatch.setattr(fused_logits, "POSITIONS_PER_CHUNK", 5)
    parts = problem()
    targets = targets_of(parts, divergence=kind, temperature=2.5, softcap=1.5)
    wanted = dense(*parts, kind, 2.5, softcap=1.5)
    assert not torch.allclose(wanted, dense(*parts, kind, 2.5), rtol=0.05)
    loss, sums = form(*parts[:2], targets=targets, scales=(0.3, 0.7))
    assert torch.allclose(sums, wanted, rtol=1e-12)
    ours = torch.autograd.grad(loss, parts[:2])
    theirs = torch.autograd.grad(0.3 * wanted[0] + 0.7 * wanted[1], parts[:2])
    for got, expected in zip(ours, theirs, strict=True):
        assert expected.abs().max() > 1e-3
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)


def test_without_a_teacher_there_is_only_the_cross_entropy() -> None:
    hidden, weight, labels, *_ = problem()
    loss, sums = fused_logit_losses(hidden, weight, targets=LogitTargets(labels), scales=(0.5, 100.0))
    wanted = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    assert sums.tolist() == [pytest.approx(wanted.item()), 0.0]
    assert loss.item() == pytest.approx(0.5 * wanted.item())
    ours = torch.autograd.grad(loss, (hidden, weight))
    for got, expected in zip(ours, torch.autograd.grad(0.5 * wanted, (hidden, weight)), strict=True):
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_no_positions_give_zeros_with_a_graph(kind: Divergence, form: Any) -> None:
    parts = problem(positions=0)
    loss, sums = form(*parts[:2], targets=targets_of(parts, divergence=kind), scales=UNIT)
    assert sums.tolist() == [0.0, 0.0]
    gradients = torch.autograd.grad(loss, parts[:2])
    assert [gradient.shape for gradient in gradients] == [part.shape for part in parts[:2]]
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("form", FORMS)
def test_only_ignored_labels_give_a_finite_zero(form: Any) -> None:
    hidden, weight, labels, *_ = problem()
    targets = LogitTargets(torch.full_like(labels, IGNORE_INDEX))
    loss, sums = form(hidden, weight, targets=targets, scales=UNIT)
    assert sums.tolist() == [0.0, 0.0]
    assert not torch.autograd.grad(loss, hidden)[0].any()


def test_zero_scales_give_the_sums_without_a_gradient() -> None:
    parts = problem()
    loss, sums = fused(parts, targets_of(parts), (0.0, 0.0))
    assert loss.item() == 0.0
    assert sums.min() > 0
    assert not torch.autograd.grad(loss, parts[1])[0].any()


def test_without_gradients_the_sums_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_logits, "POSITIONS_PER_CHUNK", 5)
    parts = problem()
    wanted = fused(parts, targets_of(parts), UNIT)
    with torch.no_grad(), LiveBytes() as measured:
        loss, sums = fused(parts, targets_of(parts), UNIT)
    assert not loss.requires_grad
    torch.testing.assert_close(sums, wanted.sums)
    assert measured.live == sums.nbytes + loss.nbytes, "no gradient was computed"


def test_a_second_backward_is_refused() -> None:
    """The gradients are scaled in place; scaled twice they would be wrong."""
    parts = problem()
    loss, _ = fused(parts, targets_of(parts), (0.5, 0.5))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_half_precision_is_summed_in_single(kind: Divergence) -> None:
    """Equal to the dense losses of the same bf16 logits in float64; a bf16 sum would be off by a percent."""
    parts = problem(positions=3000, vocabulary=50, dtype=torch.bfloat16)
    sums = fused(parts, targets_of(parts, divergence=kind), UNIT).sums
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
def test_gradients_in_half_precision_are_as_exact_as_the_dtype(
    monkeypatch: pytest.MonkeyPatch, kind: Divergence, dtype: torch.dtype
) -> None:
    """As exact as the dtype over many chunks, however small the scales are before the loss scale."""
    monkeypatch.setattr(fused_logits, "POSITIONS_PER_CHUNK", 10)
    parts = problem(positions=1000, vocabulary=50, dtype=dtype)
    scales = (1e-6, 2e-6)
    loss, _ = fused(parts, targets_of(parts, divergence=kind), scales)
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
def test_memory_is_bounded_by_one_chunk(
    monkeypatch: pytest.MonkeyPatch, kind: Divergence, temperature: float
) -> None:
    """Between forward and backward there are the gradients only; at no time more than a few [C, W]."""
    monkeypatch.setattr(fused_logits, "POSITIONS_PER_CHUNK", 32)
    positions, vocabulary = 256, 1000
    parts = problem(positions, vocabulary)
    matrix = vocabulary * parts[0].element_size()
    of_gradients = parts[0].nbytes + parts[1].nbytes
    matrices = 3 + (kind == "js") + (temperature != 1.0)

    def measured(form: Any) -> tuple[int, int]:
        targets = targets_of(parts, divergence=kind, temperature=temperature)
        with LiveBytes() as step:
            loss, _ = form(*parts[:2], targets=targets, scales=UNIT)
            kept = step.live
            torch.autograd.grad(loss, parts[:2])
        return kept, step.peak

    kept, peak = measured(fused_logit_losses)
    assert of_gradients <= kept < of_gradients + 1000
    assert peak < matrices * 32 * matrix + 3 * of_gradients
    kept, _ = measured(plain_logit_losses)
    assert kept > 2 * positions * matrix, "the measure sees logits that are kept"


def test_logits_of_a_chunk_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    real = fused_logits.sums_and_gradient

    def counting(log_student: torch.Tensor, *others: Any) -> Any:
        rows.append(log_student.shape[0])
        return real(log_student, *others)

    monkeypatch.setattr(fused_logits, "POSITIONS_PER_CHUNK", 10)
    monkeypatch.setattr(fused_logits, "sums_and_gradient", counting)
    parts = problem()
    fused(parts, targets_of(parts), UNIT).loss.backward()
    assert rows == [10, 10, 3]


def test_a_frozen_head_costs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of student.lora, or of student.train = [projector]: neither the product nor the memory for it."""
    parts = problem()
    trained = fused(parts, targets_of(parts), (0.3, 0.7))
    wanted = torch.autograd.grad(trained.loss, parts[:2])[0]

    def refused(*_: Any) -> None:
        raise AssertionError("a product for the head's gradient")

    monkeypatch.setattr(fused_logits, "_add_product", refused)
    loss, sums = fused((parts[0], parts[1].detach(), *parts[2:]), targets_of(parts), (0.3, 0.7))
    assert sums.equal(trained.sums)
    assert torch.autograd.grad(loss, parts[0])[0].equal(wanted)
