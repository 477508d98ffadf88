"""The measurement of rounded hidden states: nothing rounded is no error, and more rounding is more."""

from __future__ import annotations

import pytest
import torch

from alignkd.models.building import BuildOptions
from alignkd.models.families.mobilevlm import MobileVLM
from alignkd.models.loading import load_model
from benchmarks.evidence.cache_error import (
    DIVERGENCES,
    TOKENS,
    Row,
    body,
    compared,
    measured_term,
    of_itself,
    rounded,
)
from tests import tiny


@pytest.fixture(scope="module")
def models() -> tuple[MobileVLM, MobileVLM]:
    student, teacher = (
        load_model(folder, BuildOptions(torch.float32)) for folder in (tiny.STUDENT, tiny.TEACHER)
    )
    assert isinstance(student, MobileVLM)
    assert isinstance(teacher, MobileVLM)
    return student.eval(), teacher.eval().requires_grad_(False)


def test_errors_are_relative_to_the_term_without_rounding(models: tuple[MobileVLM, MobileVLM]) -> None:
    student, teacher = models
    batches = [tiny.batch_of("text"), tiny.batch_of("text", "text")]
    rows = []
    for divergence in DIVERGENCES:
        row = compared(("teacher", "student"), student, teacher, batches, divergence)
        rows.append(row)
        exact = measured_term(student, teacher, batches, divergence)
        assert exact.positions == sum(batch.counts.logits for batch in batches)
        assert row.per_position == exact.sum / exact.positions
        assert exact.gradient.norm() > 0
        assert all(0 < abs(row.errors[name]) < 0.02 for name in ("bf16", "fp8"))
        assert 1 > row.cosines["bf16"] > row.cosines["fp8"] > 0.99
        doubled = measured_term(
            student, teacher, batches, divergence, rounded(lambda hidden_ND: 2 * hidden_ND)
        )
        assert doubled.sum != pytest.approx(exact.sum, rel=0.02)
    assert rows[0].per_position != rows[1].per_position
    assert TOKENS.keys().isdisjoint(rows[0].errors)
    errors, cosines = rows[1].errors, rows[1].cosines
    assert -1 < errors["16 tokens"] < errors["64 tokens"] < 0  # what is left out takes from the divergence
    assert 0 < cosines["16 tokens"] < cosines["64 tokens"] < cosines["fp8"]
    assert abs(rows[1].errors["64 tokens"] - rows[1].errors["64 tokens, fp32"]) < 1e-3
    floors = {"teacher": {kind: of_itself(teacher, batches, kind) for kind in DIVERGENCES}}
    assert all(0 < floor < rows[0].per_position / 10 for floor in floors["teacher"].values())


def test_the_table_has_a_line_for_each_student_and_divergence() -> None:
    row = Row(
        "teacher", "untrained", "reverse_kl", 1.5, {"bf16": 1e-5, "fp8": -2e-3}, {"bf16": 1.0, "fp8": 0.99}
    )
    text = body([row], {"teacher": {"reverse_kl": 1e-4, "forward_kl": 2e-4}})
    assert "| teacher | untrained | reverse_kl | 1.5000 | +0.001% | -0.200% | 0.0e+00 | 1.0e-02 |" in text
    assert "most likely tokens" not in text
    assert "itself in fp8 by 1.0e-04 (reverse KL) and 2.0e-04 (forward KL) nats per position" in text


def test_forms_of_tokens_have_a_table_of_their_own() -> None:
    values = {"bf16": 1e-5, "fp8": -2e-3} | dict(zip(TOKENS, (-0.25, -0.125, -0.126, -0.125), strict=True))
    row = Row("teacher", "untrained", "forward_kl", 1.5, values, dict.fromkeys(values, 0.75))
    text = body([row], {})
    assert (
        "| teacher | untrained | 1.5000 | -25.0000% | -12.5000% | -12.6000% | -12.5000% | 2.5e-01 |" in text
    )
