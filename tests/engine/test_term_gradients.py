"""The gradient of each term by part of the student, beside a training step's own gradients."""

from __future__ import annotations

import pytest
import torch

from alignkd.config.schema import DistillationSection
from alignkd.engine.student_step import StudentStep
from alignkd.engine.term_gradients import parts_of, term_gradient_norms
from alignkd.losses.total import TERMS
from alignkd.models.building import BuildOptions
from alignkd.models.families.mobilevlm_loading import load_model
from alignkd.models.loading import load_model as load_family
from alignkd.teacher.targets import TeacherModel
from tests import tiny, vlm

SCALES = (0.1, 0.2, 0.3, 0.4, 0.5)


@pytest.fixture(scope="module")
def step() -> StudentStep:
    student = load_model(tiny.STUDENT, BuildOptions(torch.float32))
    return StudentStep(student, tiny.fixture_adapters(), DistillationSection())


def test_norms_are_those_of_each_term_alone(step: StudentStep) -> None:
    batch = tiny.batch_of("v1", "text")
    teacher = TeacherModel(load_model(tiny.TEACHER, BuildOptions(torch.float32)), 16)
    targets, head = teacher(batch), teacher.model.head.weight
    found = term_gradient_norms(step, batch, SCALES, targets, head)
    assert all(parameter.grad is None for parameter in step.parameters())
    for term, scale in enumerate(SCALES):
        alone = tuple(scale if number == term else 0.0 for number in range(len(TERMS)))
        step(batch, alone, targets, head).loss.backward()
        expected = [
            torch.stack(
                [parameter.grad.norm() for parameter in part if parameter.grad is not None]
                or [torch.zeros(())]
            )
            .norm()
            .item()
            for part in parts_of(step.student).values()
        ]
        step.zero_grad(set_to_none=True)
        assert found[term].tolist() == pytest.approx(expected, rel=1e-5), TERMS[term]


def test_without_a_teacher_only_the_labels_have_a_gradient(step: StudentStep) -> None:
    norms = term_gradient_norms(step, tiny.batch_of("v1"), SCALES, None, None)
    assert norms[0].gt(0).all()
    assert not norms[1:].any()


def test_a_term_without_weight_is_not_run(step: StudentStep, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = []
    forward = step.forward
    monkeypatch.setattr(step, "forward", lambda *given: forwards.append(given[1]) or forward(*given))
    term_gradient_norms(step, tiny.batch_of("v1"), (0.1, 0.0, 0.0, 0.0, 0.0), None, None)
    assert forwards == [(0.1, 0.0, 0.0, 0.0, 0.0)]


def test_parts_are_projector_layers_and_head(step: StudentStep) -> None:
    parts = parts_of(step.student)
    layers = len(step.student.language_model.layers)
    expected = {f"layer {number} {kind}" for number in range(layers) for kind in ("queries and keys", "rest")}
    assert set(parts) == expected | {"projector", "head", "other"}
    trained = [parameter for parameter in step.student.parameters() if parameter.requires_grad]
    assert sum(map(len, parts.values())) == len(trained)
    assert len(parts["layer 0 queries and keys"]) == 2


@pytest.mark.parametrize("family", ["llava", "smolvlm", "gemma3"])
def test_other_families_have_the_same_parts(family: str) -> None:
    student = load_family(vlm.folder(family), BuildOptions(torch.float32))
    parts = parts_of(student)
    layers = len(student.whole.get_decoder().layers)
    expected = {f"layer {number} {kind}" for number in range(layers) for kind in ("queries and keys", "rest")}
    assert set(parts) == expected | {"projector", "head", "other"}
    assert [id(parameter) for parameter in parts["head"]] == [id(student.head.weight)]
