"""What measuring the gradients of the terms adds to a plan."""

from __future__ import annotations

from typing import Any

import pytest

from alignkd.config import Config
from launcher.plan.advice import advise
from launcher.plan.measurements import measured_flops, measurement_line
from launcher.plan.plan import GIB, Plan, make_plan
from launcher.plan.trained import trained_parts
from launcher.plan.workload import Cluster
from tests.launcher.plan import test_advice

config = test_advice.config  # the fixture: a 7B teacher and a 1.7B student


def plan_with(given: Config, section: str, **changes: Any) -> Plan:
    updated = getattr(given, section).model_copy(update=changes)
    return make_plan(given.model_copy(update={section: updated}), Cluster(4, 2))


def test_a_measurement_takes_a_teacher_forward_and_a_pass_of_the_student_for_each_term(
    config: Config,
) -> None:
    plan = plan_with(config, "distillation", balance="gradient", balance_every=50)
    compute = plan.compute
    # A step has 8 micro-batches: 128 samples of 8 ranks, 2 at a time.
    expected = (compute.teacher_flops + 5 * compute.student_flops) / 8
    assert measured_flops(plan.config, compute) == pytest.approx(expected)
    share = expected / 50 / compute.flops
    line = str(measurement_line(plan.config, compute))
    assert f"on average {share:.1%} of a step" in line
    assert "gradient measures every 50 steps: " in line
    each = plan_with(config, "distillation", balance="gradient", balance_every=1)
    assert "gradient measures every step: " in str(measurement_line(each.config, each.compute))
    weights = config.distillation.weights.model_copy(update={"vision": 0.0})
    fewer = plan_with(config, "distillation", balance="gradient", weights=weights)
    expected = (compute.teacher_flops + 3 * compute.student_flops) / 8
    assert measured_flops(fewer.config, compute) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("section", "changes"),
    [("distillation", {"balance": "gradient"}), ("logging", {"gradient_norms_every": 7})],
)
def test_measured_gradients_take_memory_and_rule_stage_3_out(
    config: Config, section: str, changes: dict[str, Any]
) -> None:
    plain, measured = make_plan(config, Cluster(4, 2)), plan_with(config, section, **changes)
    whole = sum(plain.sizes.student.trainable(trained_parts(config)).values())
    added = measured.memory.phase_bytes("student") - plain.memory.phase_bytes("student")
    assert added == 2 * whole  # bf16
    memory = 14 * GIB
    for plan, stages in ((plain, {2, 3}), (measured, {2})):
        advised = advise(plan, memory)
        assert advised is None or advised.config.student.zero_stage in stages
    assert advise(plain, memory).config.student.zero_stage == 3  # type: ignore[union-attr]


def test_other_balances_measure_nothing(config: Config) -> None:
    plain = make_plan(config, Cluster(4, 2))
    for changes in ({"balance": "learned"}, {"balance": "gradient", "enabled": False}):
        plan = plan_with(config, "distillation", **changes)
        assert measurement_line(plan.config, plan.compute) is None
        assert "a term's gradients, measured" not in [part.name for part in plan.memory.parts]
    assert measurement_line(config, plain.compute) is None
