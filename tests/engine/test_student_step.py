"""The loss that is minimised is the one that is reported: every term at its weight, in value and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from alignkd.config.schema import DistillationSection
from alignkd.data.batch import Batch
from alignkd.engine.optimizer_step import term_weights
from alignkd.engine.student_step import StepOutput, StudentStep
from alignkd.losses.total import TERMS, element_counts, term_scales
from alignkd.models.building import BuildOptions
from alignkd.models.loading import load_model
from alignkd.teacher.targets import TeacherModel, TeacherTargets
from tests import tiny

WEIGHTS = {"logits": 3.0, "attention": 1000.0, "vision": 5.0}
FOCUS = 0.8
EXPECTED_WEIGHTS = {
    "ce": 1.0,
    "divergence": 3.0,
    "attention": 1000.0,
    "vision_all": 5.0,
    "vision_focus": 5.0 * 0.8,
}
FP64 = BuildOptions(torch.float64)


def section(**changes: Any) -> DistillationSection:
    return DistillationSection.model_validate(
        {"weights": WEIGHTS, "vision_focus_weight": FOCUS, "temperature": 2.0, **changes}
    )


@pytest.fixture(scope="module")
def teacher() -> TeacherModel:
    return TeacherModel(load_model(tiny.TEACHER, FP64), top_k=16)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return tiny.batch_of("v1", "rounds", "text")


@pytest.fixture(scope="module")
def targets(teacher: TeacherModel, batch: Batch) -> TeacherTargets:
    found: TeacherTargets = teacher(batch)
    return found


def step_of(distillation: DistillationSection) -> StudentStep:
    return StudentStep(load_model(tiny.STUDENT, FP64), tiny.fixture_adapters().double(), distillation)


def run(step: StudentStep, scales: tuple[float, ...], batch: Batch, *teacher_side: Any) -> StepOutput:
    step.zero_grad(set_to_none=True)
    output: StepOutput = step(batch, scales, *teacher_side)
    output.loss.backward()
    return output


def gradients(step: StudentStep) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}


def test_the_minimised_loss_is_the_weighted_sum_of_the_reported_terms(
    teacher: TeacherModel, batch: Batch, targets: TeacherTargets
) -> None:
    distillation = section()
    step = step_of(distillation)
    counts = element_counts(batch.counts, step.sizes())
    scales = term_scales(counts, term_weights(distillation), 1.0)
    head = teacher.model.head.weight
    output = run(step, scales, batch, targets, head)
    total = gradients(step)
    parts = [EXPECTED_WEIGHTS[term] * output.sums[place] / counts[term] for place, term in enumerate(TERMS)]
    assert min(parts) > 0.05 * output.loss, "every term can be seen in the sum"
    assert output.loss.item() == pytest.approx(sum(parts).item(), rel=1e-12)
    # The gradient is that of each reported term alone, at its weight.
    expected = {name: torch.zeros_like(value) for name, value in total.items()}
    for place, term in enumerate(TERMS):
        alone = run(step, tuple(float(number == place) for number in range(len(TERMS))), batch, targets, head)
        assert alone.loss.item() == pytest.approx(output.sums[place].item(), rel=1e-12)
        for name, gradient in gradients(step).items():
            expected[name] += EXPECTED_WEIGHTS[term] / counts[term] * gradient
    for name, gradient in total.items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6 * scale, msg=name)


def test_gradients_are_the_derivatives_of_the_reported_sums(
    teacher: TeacherModel, batch: Batch, targets: TeacherTargets
) -> None:
    """By central differences along a random direction, for each term: a factor that is in the gradient only
    would not be in the differences."""
    step = step_of(section())
    head = teacher.model.head.weight
    generator = torch.Generator().manual_seed(0)
    trained = {name: p for name, p in step.named_parameters() if p.requires_grad}
    direction = {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.detach().abs().mean()
        for name, p in trained.items()
    }

    def shifted_sums(amount: float) -> torch.Tensor:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter += amount * direction[name]
            sums: torch.Tensor = step(batch, (0.0,) * len(TERMS), targets, head).sums
            for name, parameter in trained.items():
                parameter -= amount * direction[name]
        return sums

    difference = 1e-3  # transformers normalises in fp32 whatever the model's dtype
    slopes = (shifted_sums(difference) - shifted_sums(-difference)) / (2 * difference)
    for place, term in enumerate(TERMS):
        run(step, tuple(float(number == place) for number in range(len(TERMS))), batch, targets, head)
        slope = sum(
            float((p.grad * direction[name]).sum()) for name, p in trained.items() if p.grad is not None
        )
        assert abs(slope) > 1e-3, term
        assert slope == pytest.approx(slopes[place].item(), rel=0.01), term


def test_the_configured_temperature_and_divergence_are_used(
    teacher: TeacherModel, batch: Batch, targets: TeacherTargets
) -> None:
    """At T = 2, from whole logits: T squared times the KL of tempered distributions. The cross-entropy has no
    temperature."""
    step = step_of(section(divergence="forward_kl"))
    with torch.no_grad():
        hidden_ND = step.student(batch).hidden_BLD.flatten(0, 1)[batch.logit_positions_N]
        logits, teacher_logits = step.student.logits(hidden_ND), teacher.model.logits(targets.hidden_ND)
    p, q = (logits / 2).softmax(-1), (teacher_logits / 2).softmax(-1)
    sums = step(batch, (0.0,) * len(TERMS), targets, teacher.model.head.weight).sums
    assert sums[1].item() == pytest.approx(4 * (q * (q / p).log()).sum().item(), rel=1e-9)
    ce = F.cross_entropy(logits, batch.logit_labels_N, reduction="sum")
    assert sums[0].item() == pytest.approx(ce.item(), rel=1e-9)
    reverse = step_of(section()).forward(batch, (0.0,) * len(TERMS), targets, teacher.model.head.weight).sums
    assert reverse[1].item() == pytest.approx(4 * (p * (p / q).log()).sum().item(), rel=1e-9)


def test_weights_come_from_the_configuration() -> None:
    unit = term_weights(DistillationSection())
    assert unit == {"ce": 1.0, "divergence": 1.0, "attention": 1.0, "vision_all": 1.0, "vision_focus": 0.1}
    assert term_weights(section()) == pytest.approx(EXPECTED_WEIGHTS)


def test_without_distillation_only_the_cross_entropy_has_a_weight() -> None:
    weights = term_weights(DistillationSection(enabled=False))
    assert weights == {term: float(term == "ce") for term in TERMS}
