"""What an optimizer step minimises: the configured weights times the means over the whole window."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignkd.config.schema import DistillationSection
from alignkd.data.batch import TermCounts
from alignkd.distributed.ranks import Ranks
from alignkd.engine.optimizer_step import StepInfo, run_optimizer_step
from alignkd.engine.stopwatch import Stopwatch
from alignkd.engine.student_step import StudentStep
from alignkd.losses.total import TERMS, element_counts
from alignkd.models.building import BuildOptions
from alignkd.models.loading import load_model
from alignkd.teacher.targets import TeacherModel
from tests import tiny
from tests.engine.plain_engine import PlainEngine, ResidentTeacher

FP32 = BuildOptions(torch.float32)
WEIGHTS = {"logits": 3.0, "attention": 1000.0, "vision": 5.0}


def minimised_and_reported(
    in_use: dict[str, float] | None = None, **distillation: Any
) -> tuple[float, dict[str, float]]:
    """(the loss that DeepSpeed minimises, means by term) of a window of two micro-batches."""
    section = DistillationSection.model_validate(distillation)
    student = load_model(tiny.STUDENT, FP32)
    module = StudentStep(student, tiny.fixture_adapters() if section.enabled else None, section)
    window = [tiny.batch_of("v1", "text"), tiny.batch_of("rounds")]
    counts = sum((batch.counts for batch in window), start=TermCounts())
    elements = element_counts(counts, module.sizes())
    info = StepInfo(counts, elements, usr1=False, term=False)
    teacher = ResidentTeacher(TeacherModel(load_model(tiny.TEACHER, FP32), 16)) if section.enabled else None
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    engine = PlainEngine(module)
    watch = Stopwatch()
    done = run_optimizer_step(engine, teacher, window, info, section, ranks, watch, weights=in_use)
    sums = done.terms.tolist()
    means = {term: value / max(elements[term], 1) for term, value in zip(TERMS, sums, strict=True)}
    # DeepSpeed divides by the configured accumulation steps in backward.
    return sum(loss.item() for loss in engine.losses) / engine.gradient_accumulation_steps(), means


def test_the_minimised_loss_has_the_configured_weights() -> None:
    minimised, means = minimised_and_reported(weights=WEIGHTS, vision_focus_weight=0.8)
    parts = {
        "ce": means["ce"],
        "divergence": 3.0 * means["divergence"],
        "attention": 1000.0 * means["attention"],
        "vision_all": 5.0 * means["vision_all"],
        "vision_focus": 5.0 * 0.8 * means["vision_focus"],
    }
    assert min(parts.values()) > 0.05 * minimised, "every term can be seen in the sum"
    assert minimised == pytest.approx(sum(parts.values()), rel=1e-5)


def test_weights_in_use_replace_the_configured_ones() -> None:
    in_use = dict(zip(TERMS, (1.0, 0.25, 2000.0, 3.0, 7.0), strict=True))
    minimised, means = minimised_and_reported(in_use, weights=WEIGHTS)
    wanted = sum(in_use[term] * means[term] for term in TERMS)
    assert minimised == pytest.approx(wanted, rel=1e-5)


def test_the_default_weights_are_the_papers() -> None:
    minimised, means = minimised_and_reported()
    vision = means["vision_all"] + 0.1 * means["vision_focus"]
    wanted = means["ce"] + means["divergence"] + means["attention"] + vision
    assert minimised == pytest.approx(wanted, rel=1e-5)


def test_without_distillation_only_the_cross_entropy_is_minimised() -> None:
    minimised, means = minimised_and_reported(enabled=False, weights=WEIGHTS)
    assert minimised == pytest.approx(means["ce"], rel=1e-5)
    assert [means[term] for term in TERMS[1:]] == [0.0] * 4
