"""Forward KL from the teacher's most likely tokens plus the probability of the rest."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from alignkd.losses import fused_logits
from alignkd.losses.fused_logits import fused_logit_losses
from alignkd.losses.logits import IGNORE_INDEX, LogitTargets, plain_logit_losses
from alignkd.losses.top_tokens import TopTokens, completed, top_tokens
from alignkd.models.families.interface import LanguageModelHead
from benchmarks.measure import LiveBytes
from tests.losses.distributions import assert_same_loss_and_gradients, dense, problem

VOCABULARY = 11
FORMS = (fused_logit_losses, plain_logit_losses)


def top_of(parts: tuple[torch.Tensor, ...], count: int, temperature: float = 1.0) -> TopTokens:
    return top_tokens((parts[3] @ parts[4].T / temperature).log_softmax(-1), count)


def bucketed(parts: tuple[torch.Tensor, ...], count: int, temperature: float) -> torch.Tensor:
    """[cross-entropy, divergence], written out with whole probabilities, the rest being a sum of them."""
    hidden, weight, labels, teacher_hidden, teacher_weight = parts
    scores = hidden @ weight.T
    ce = F.cross_entropy(scores, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    p, q = ((teacher_hidden @ teacher_weight.T) / temperature).softmax(-1), (scores / temperature).softmax(-1)
    order = p.argsort(dim=-1, descending=True)
    p, q = p.gather(1, order), q.gather(1, order)
    divergence = (p[:, :count] * (p[:, :count] / q[:, :count]).log()).sum()
    if count < p.shape[1]:
        p_rest, q_rest = p[:, count:].sum(dim=-1), q[:, count:].sum(dim=-1)
        divergence = divergence + (p_rest * (p_rest / q_rest).log()).sum()
    return torch.stack([ce, divergence * temperature**2])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("count", [1, 4, VOCABULARY - 1, VOCABULARY])
@pytest.mark.parametrize("chunk", [1, 5, 22, 512, None])
def test_values_and_gradients_are_those_of_the_outcomes_written_out(
    monkeypatch: pytest.MonkeyPatch, chunk: int | None, count: int, temperature: float
) -> None:
    """``chunk`` None: the plain form."""
    monkeypatch.setattr(fused_logits, "POSITIONS_PER_CHUNK", chunk)
    form: Any = fused_logit_losses if chunk is not None else plain_logit_losses
    parts = problem(vocabulary=VOCABULARY)
    top = top_of(parts, count, temperature)
    targets = LogitTargets(parts[2], divergence="forward_kl", temperature=temperature, teacher_top=top)
    wanted = bucketed(parts, count, temperature)
    for ce_scale, divergence_scale, factor in ((0.0, 1.0, 1.0), (2e-3, 7e-4, 65536.0)):
        loss, sums = form(*parts[:2], targets=targets, scales=(ce_scale, divergence_scale))
        assert torch.allclose(sums, wanted, rtol=1e-12)
        wanted_loss = ce_scale * wanted[0] + divergence_scale * wanted[1]
        assert_same_loss_and_gradients(loss, wanted_loss, parts[:2], factor)


def test_more_tokens_bring_it_up_to_the_whole_forward_kl() -> None:
    """The data-processing inequality, at every position; equal with the whole vocabulary."""
    parts = problem(positions=1, vocabulary=VOCABULARY)
    for temperature in (1.0, 2.0):
        whole = dense(*parts, "forward_kl", temperature)[1].item()
        found = []
        for count in range(1, VOCABULARY + 1):
            targets = LogitTargets(
                parts[2],
                divergence="forward_kl",
                temperature=temperature,
                teacher_top=top_of(parts, count, temperature),
            )
            found.append(fused_logit_losses(*parts[:2], targets=targets, scales=(0.0, 1.0)).sums[1].item())
        assert found == sorted(found)
        assert 0 < found[0] < 0.9 * whole
        assert found[-2:] == [pytest.approx(whole, rel=1e-12)] * 2, "a rest of one token is that token"


def test_capped_logits_of_the_student_count() -> None:
    parts = problem()
    top = top_of(parts, VOCABULARY)
    targets = LogitTargets(parts[2], divergence="forward_kl", softcap=1.5, teacher_top=top)
    ours = fused_logit_losses(*parts[:2], targets=targets, scales=(0.3, 0.7))
    theirs = plain_logit_losses(*parts[:2], targets=targets, scales=(0.3, 0.7))
    scores = 1.5 * (parts[0] @ parts[1].T / 1.5).tanh()
    teacher = (parts[3] @ parts[4].T).softmax(-1)
    wanted = F.kl_div(scores.log_softmax(-1), teacher, reduction="sum")
    for found in (ours, theirs):
        assert found.sums[1].item() == pytest.approx(wanted.item(), rel=1e-12)
    for got, expected in zip(
        *(torch.autograd.grad(of.loss, parts[:2]) for of in (ours, theirs)), strict=True
    ):
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rest", [-torch.inf, -200.0, -20.0])
def test_a_rest_of_almost_nothing_is_finite_whatever_the_student_does(form: Any, rest: float) -> None:
    """The student puts almost all into the rest, which costs it the tokens' log-probabilities, and almost
    nothing, which costs nothing."""
    top = TopTokens(torch.tensor([[-0.5, -0.9327521, rest]]), torch.tensor([[3, 1]], dtype=torch.int32))
    for tokens_logit in (-60.0, 0.0, 60.0):
        scores = torch.zeros(1, 6)
        scores[0, [1, 3]] = tokens_logit
        weight = torch.eye(6).requires_grad_()
        hidden = scores.requires_grad_()
        targets = LogitTargets(torch.tensor([IGNORE_INDEX]), divergence="forward_kl", teacher_top=top)
        loss, sums = form(hidden, weight, targets=targets, scales=(1.0, 1.0))
        p = top.log_probs_NR.double().exp()
        q = scores.detach().double().softmax(-1)
        q = torch.cat([q[:, [3, 1]], q[:, [0, 2, 4, 5]].sum(dim=-1, keepdim=True)], dim=-1)
        wanted = (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum()
        assert sums[1].item() == pytest.approx(wanted.item(), rel=1e-5)
        (gradient,) = torch.autograd.grad(loss, hidden)
        expected = scores.detach().double().softmax(-1)
        expected[0, [3, 1]] -= p[0, :2]
        expected[0, [0, 2, 4, 5]] -= p[0, 2] / 4
        assert torch.allclose(gradient.double(), expected, atol=1e-6)


def test_probabilities_that_were_rounded_sum_up_to_1() -> None:
    """Otherwise the gradient would not sum to 0, and the divergence of equal distributions could be
    negative."""
    parts = problem(positions=50, vocabulary=40)
    top = top_of(parts, 8)
    rounded = TopTokens(top.log_probs_NR.half(), top.tokens_NK)
    log_student = (parts[0] @ parts[1].T).float().log_softmax(-1).detach()
    assert not torch.allclose(rounded.log_probs_NR.float().exp().sum(-1), torch.ones(50), atol=1e-5)
    assert torch.allclose(completed(rounded, log_student, 1.0).exp().sum(-1), torch.ones(50), atol=1e-6)


def test_the_most_likely_tokens_come_first_and_the_rest_is_exact() -> None:
    log_probs = torch.tensor([[0.1, 0.4, 1e-12, 0.2, 0.3 - 1e-12]], dtype=torch.float64).log()
    top = top_tokens(log_probs, 4)
    assert top.tokens_NK.tolist() == [[1, 4, 3, 0]]
    assert top.tokens_NK.dtype == torch.int32
    assert top.log_probs_NR.exp().tolist() == [pytest.approx([0.4, 0.3, 0.2, 0.1, 1e-12], rel=1e-9)]


@pytest.mark.parametrize("kind", ["reverse_kl", "js"])
def test_other_divergences_are_refused(kind: Any) -> None:
    parts = problem()
    with pytest.raises(ValueError, match=f"teacher_top is for divergence = forward_kl only, not for {kind}"):
        LogitTargets(parts[2], divergence=kind, teacher_top=top_of(parts, 2))


def test_rows_that_pad_the_vocabulary_are_no_part_of_the_rest() -> None:
    parts = problem(vocabulary=VOCABULARY)
    head = LanguageModelHead(4, VOCABULARY + 5).double()
    head.used = VOCABULARY
    with torch.no_grad():
        head.weight[:VOCABULARY] = parts[1]
    targets = LogitTargets(parts[2], divergence="forward_kl", teacher_top=top_of(parts, 4))
    loss, sums = head(parts[0], partial(fused_logit_losses, targets=targets, scales=(0.0, 1.0)))
    assert torch.allclose(sums, bucketed(parts, 4, 1.0), rtol=1e-12)
    (gradient,) = torch.autograd.grad(loss, head.weight)
    assert gradient[:VOCABULARY].any(dim=1).all()
    assert not gradient[VOCABULARY:].any()


def test_no_positions_give_zeros_with_a_graph() -> None:
    parts = problem(positions=0)
    targets = LogitTargets(parts[2], divergence="forward_kl", teacher_top=top_of(parts, 3))
    for form in FORMS:
        loss, sums = form(*parts[:2], targets=targets, scales=(1.0, 1.0))
        assert sums.tolist() == [0.0, 0.0]
        assert not any(gradient.any() for gradient in torch.autograd.grad(loss, parts[:2]))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_memory_is_bounded_by_one_chunk(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    """No more than with the teacher's head, of which a chunk's logits exist as well."""
    monkeypatch.setattr(fused_logits, "POSITIONS_PER_CHUNK", 32)
    parts = problem(256, 1000)
    targets = LogitTargets(
        parts[2],
        divergence="forward_kl",
        temperature=temperature,
        teacher_top=top_of(parts, 16, temperature),
    )
    of_gradients = parts[0].nbytes + parts[1].nbytes
    with LiveBytes() as step:
        loss, _ = fused_logit_losses(*parts[:2], targets=targets, scales=(1.0, 1.0))
        kept = step.live
        torch.autograd.grad(loss, parts[:2])
    assert of_gradients <= kept < of_gradients + 1000
    assert step.peak < (3 + (temperature != 1.0)) * 32 * 1000 * 8 + 3 * of_gradients
