"""Every term against values that were computed independently in float64 from the authors' outputs."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from alignkd.config.schema import DistillationSection
from alignkd.data.batch import Batch
from alignkd.engine.optimizer_step import term_weights
from alignkd.engine.student_step import StudentStep
from alignkd.losses.total import TERMS, element_counts, means, term_scales, total
from alignkd.models.building import BuildOptions
from alignkd.models.loading import load_model
from alignkd.teacher.targets import TeacherModel
from tests import tiny

RAGGED = ("v1", "rounds", "text")
SINGLES = [(name,) for name in tiny.CASES]
BATCHES = [
    *SINGLES,
    *permutations(RAGGED),
    tuple(tiny.CASES),
    ("v1", "v1"),
    ("rounds", "v1", "text", "plain"),
]


@pytest.fixture(scope="module")
def teacher() -> TeacherModel:
    return TeacherModel(load_model(tiny.TEACHER, BuildOptions(torch.float32)), top_k=16)


def student_step(**distillation: object) -> StudentStep:
    section = DistillationSection.model_validate(distillation)
    return StudentStep(
        load_model(tiny.STUDENT, BuildOptions(torch.float32)), tiny.fixture_adapters(), section
    )


def measure(
    step: StudentStep, teacher: TeacherModel, batch: Batch
) -> tuple[dict[str, float], dict[str, int]]:
    counts = element_counts(batch.counts, step.sizes())
    sums = step(batch, (0.0,) * len(TERMS), teacher(batch), teacher.model.head.weight).sums
    return means(dict(zip(TERMS, sums.tolist(), strict=True)), counts), counts


def expected_of(cases: tuple[str, ...]) -> dict[str, dict[str, float]]:
    if len(set(cases)) == 1:  # the same sample twice has the same means
        return tiny.EXPECTED_LOSSES[cases[0]]
    joined = "+".join(case for case in tiny.CASES if case in cases)
    return tiny.EXPECTED_LOSSES[f"batch {joined}"]


@pytest.mark.parametrize("cases", BATCHES, ids="+".join)
def test_terms_and_counts_equal_the_expected_ones(teacher: TeacherModel, cases: tuple[str, ...]) -> None:
    section = DistillationSection()
    values, counts = measure(student_step(), teacher, tiny.batch_of(*cases))
    expected = expected_of(cases)
    repeats = len(cases) if len(set(cases)) == 1 else 1
    for term in TERMS:
        name = "reverse_kl" if term == "divergence" else term
        assert values[term] == pytest.approx(expected["terms"][name], rel=1e-5), name
        assert counts[term] == expected["counts"][name] * repeats, name
    assert total(values, term_weights(section)) == pytest.approx(expected["terms"]["total"], rel=1e-5)


@pytest.mark.parametrize("case", tiny.CASES)
def test_forward_kl_equals_the_expected_one(teacher: TeacherModel, case: str) -> None:
    values, _ = measure(student_step(divergence="forward_kl"), teacher, tiny.batch_of(case))
    assert values["divergence"] == pytest.approx(tiny.EXPECTED_LOSSES[case]["terms"]["forward_kl"], rel=1e-5)


@pytest.mark.parametrize("case", ["plain", "v1", "rounds"])
def test_focus_indices_equal_the_expected_ones(teacher: TeacherModel, case: str) -> None:
    chosen = teacher(tiny.batch_of(case)).focus_indices_IK
    assert sorted(chosen[0].tolist()) == tiny.EXPECTED_LOSSES[case]["focus_indices"]


@pytest.mark.parametrize("term", TERMS)
def test_every_term_moves_the_student(teacher: TeacherModel, term: str) -> None:
    step, batch = student_step(), tiny.batch_of(*RAGGED)
    counts = element_counts(batch.counts, step.sizes())
    scales = term_scales(counts, {name: float(name == term) for name in TERMS}, 1.0)
    step(batch, scales, teacher(batch), teacher.model.head.weight).loss.backward()
    moved = {
        name
        for name, p in step.student.named_parameters()
        if p.grad is not None and p.grad.abs().max() > 1e-9
    }
    reached = {
        "ce": "language_model.layers.1.mlp.up_proj.weight",
        "divergence": "language_model.layers.1.mlp.up_proj.weight",
        "attention": "language_model.layers.0.self_attn.q_proj.weight",
        "vision_all": "projector.mlp.mlp.0.weight",
        "vision_focus": "projector.mlp.mlp.0.weight",
    }
    assert reached[term] in moved
    if term in ("attention", "vision_all", "vision_focus"):
        adapter = step.adapters.attention if term == "attention" else step.adapters.vision
        assert adapter.weight.grad.abs().max() > 0


@pytest.mark.parametrize("cases", [(), ("text",)], ids=["all-masked", "text-only"])
def test_terms_without_elements_are_zeros_with_a_graph(teacher: TeacherModel, cases: tuple[str, ...]) -> None:
    step, batch = student_step(), tiny.batch_of(*cases)
    counts = element_counts(batch.counts, step.sizes())
    scales = term_scales(counts, term_weights(DistillationSection()), 1.0)
    output = step(batch, scales, teacher(batch), teacher.model.head.weight)
    assert output.sums[2:].tolist() == [0.0, 0.0, 0.0]
    if not cases:
        assert output.loss.item() == 0.0
    output.loss.backward()
    for name, parameter in step.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("cases", [(), ("text",), ("v1", "text")], ids=["all-masked", "text-only", "mixed"])
def test_without_a_teacher_every_trained_parameter_takes_part(cases: tuple[str, ...]) -> None:
    """A rank whose batch has no image must not deadlock the others in the projector's collectives."""
    model = load_model(tiny.STUDENT, BuildOptions(torch.float32))
    step = StudentStep(model, None, DistillationSection(enabled=False))
    batch = tiny.batch_of(*cases)
    output = step(batch, (1.0, 0.0, 0.0, 0.0, 0.0))
    assert output.sums[1:].tolist() == [0.0] * 4
    output.loss.backward()
    for name, parameter in step.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert bool(model.projector.mlp.mlp[0].weight.grad.any()) == ("v1" in cases)
    if len(cases) == 1:
        expected = tiny.EXPECTED_LOSSES[cases[0]]["terms"]["ce"]
        assert output.sums[0].item() / batch.counts.supervised == pytest.approx(expected, rel=1e-5)
