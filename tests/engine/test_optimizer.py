"""The learning rate as a function of the step; the rate and decay of each parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignkd.config.schema import DistillationSection, TrainingSection
from alignkd.engine.optimizer import (
    base_rates,
    build_optimizer,
    parameter_groups,
    schedule_factor,
    set_learning_rates,
)
from alignkd.engine.student_step import StudentStep
from alignkd.models.building import BuildOptions
from alignkd.models.loading import load_model
from tests import tiny

RATES: dict[str, Any] = {
    "learning_rate": 1e-4,
    "projector_learning_rate": 1e-3,
    "adapter_learning_rate": 5e-3,
    "weight_decay": 0.1,
}


def step_module(adapters: bool = True) -> StudentStep:
    student = load_model(tiny.STUDENT, BuildOptions(torch.float32))
    return StudentStep(student, tiny.fixture_adapters() if adapters else None, DistillationSection())


def groups_by_name(module: StudentStep, training: TrainingSection) -> dict[str, dict[str, Any]]:
    """The group of every parameter; each trained one is in exactly one."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    found: dict[str, dict[str, Any]] = {}
    for group in parameter_groups(module, training):
        for parameter in group["params"]:
            assert names[parameter] not in found
            found[names[parameter]] = group
    return found


def test_warm_up_ends_at_the_peak() -> None:
    factors = [schedule_factor(step, 1000, 0.03) for step in range(1000)]
    assert factors[0] == pytest.approx(1 / 30), "the first step already learns"
    assert factors[28] == pytest.approx(29 / 30)
    assert factors[29] == factors[30] == 1.0
    assert factors[31] < 1.0
    assert factors == sorted(factors[:30]) + sorted(factors[30:], reverse=True)


def test_the_rate_ends_near_zero_and_is_half_in_the_middle() -> None:
    assert 0 < schedule_factor(999, 1000, 0.03) < 1e-4
    assert schedule_factor(1000, 1000, 0.03) == pytest.approx(0.0, abs=1e-12)
    assert schedule_factor(30 + 485, 1000, 0.03) == pytest.approx(0.5)


@pytest.mark.parametrize("total", [1, 2, 7])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.5, 0.999])
def test_short_runs_and_odd_ratios_learn_at_every_step(total: int, ratio: float) -> None:
    factors = [schedule_factor(step, total, ratio) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1.0


def test_without_warm_up_the_first_step_is_the_peak() -> None:
    assert schedule_factor(0, 100, 0.0) == 1.0


def test_a_missing_rate_defaults_to_the_projector_s_or_the_base() -> None:
    def rates(**given: float) -> list[float]:
        return list(base_rates(TrainingSection(**given)).values())

    assert rates(learning_rate=1e-4) == [1e-4, 1e-4, 1e-4]
    assert rates(learning_rate=1e-4, projector_learning_rate=1e-3) == [1e-4, 1e-3, 1e-3]
    assert rates(learning_rate=1e-4, adapter_learning_rate=1e-2) == [1e-4, 1e-4, 1e-2]


def test_every_trained_parameter_has_the_rate_and_decay_of_its_part() -> None:
    module = step_module()
    groups = groups_by_name(module, TrainingSection(**RATES))
    assert set(groups) == {
        name for name, p in module.named_parameters() if not name.startswith("student.vision_tower.")
    }
    for name, group in groups.items():
        rate = RATES["learning_rate"]
        if name.startswith("student.projector."):
            rate = RATES["projector_learning_rate"]
        elif name.startswith("adapters."):
            rate = RATES["adapter_learning_rate"]
        assert group["lr"] == group["base_rate"] == rate, name
        is_vector = name.endswith(("bias", "norm.weight"))
        is_vector |= "layernorm" in name
        decay = 0.0 if is_vector or name.startswith("adapters.") else 0.1
        assert group["weight_decay"] == decay, name


def test_parts_with_equal_rates_have_groups_of_their_own() -> None:
    groups = parameter_groups(step_module(), TrainingSection(learning_rate=1e-4, weight_decay=0.1))
    described = sorted((group["lr"], group["weight_decay"]) for group in groups)
    assert described == [(1e-4, 0.0)] * 3 + [(1e-4, 0.1)] * 2


def test_without_distillation_there_is_no_adapter_group() -> None:
    groups = groups_by_name(step_module(adapters=False), TrainingSection(**RATES))
    assert RATES["adapter_learning_rate"] not in {group["lr"] for group in groups.values()}


def test_a_trained_tower_is_in_the_groups_except_its_unused_layers() -> None:
    module = step_module()
    module.student.unfreeze_vision_tower()
    groups = groups_by_name(module, TrainingSection(**RATES))
    tower = "student.vision_tower."
    assert groups[tower + "encoder.layers.1.mlp.fc1.weight"]["lr"] == RATES["learning_rate"]
    assert groups[tower + "embeddings.class_embedding"]["weight_decay"] == 0.0
    assert not any(
        name.startswith((tower + "encoder.layers.2.", tower + "post_layernorm")) for name in groups
    )


def test_rates_are_set_from_the_peak_every_time() -> None:
    optimizer = build_optimizer(
        parameter_groups(step_module(), TrainingSection(**RATES)), torch.device("cpu")
    )
    assert isinstance(optimizer, torch.optim.AdamW)
    for factor in (0.5, 0.25):
        set_learning_rates(optimizer, factor)
        rates = {group["lr"] for group in optimizer.param_groups}
        assert rates == {RATES[name] * factor for name in RATES if name.endswith("learning_rate")}
