"""The step of two families on tiny models: floor and product make the same losses of the same parameters."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from benchmarks import family_step
from benchmarks.batches import Shape
from benchmarks.families import BUILDERS, random_models, random_window
from benchmarks.models import Decoder

CPU = torch.device("cpu")
TINY = (Decoder(48, 64, 2, 2), Decoder(32, 48, 4, 2))  # deepstack features reach three layers


@pytest.mark.parametrize("name", BUILDERS)
def test_floor_and_product_are_timed_in_turns_on_the_same_losses(name: str) -> None:
    teacher, student = random_models(name, torch.float32, CPU, TINY)
    setting = family_step.new_setting(name, teacher, student, CPU)
    shape = Shape("one", (BUILDERS[name].vision_tokens + 100,))
    found = family_step.measure(setting, shape, "fp32", budget=0, deadline=0)
    assert list(found) == ["floor", "ours"]
    assert all(len(result.seconds) == 1 for result in found.values())  # the deadline is over
    assert found["ours"].memory.kept >= found["floor"].memory.kept > 0
    assert not any(parameter.grad is not None for parameter in student.plain.parameters())

    (batch,) = window = random_window(name, shape, CPU)
    assert batch.counts.vision_tokens == BUILDERS[name].vision_tokens
    assert batch.counts.supervised == 32
    shared = dict(student.plain.named_parameters())
    assert all(value is shared[key.removeprefix("whole.")] for key, value in student.ours.named_parameters())
    trained = [parameter for parameter in student.ours.parameters() if parameter.requires_grad]
    for method in family_step.METHODS.values():
        method(setting, window)
        assert all(parameter.grad is not None for parameter in trained)
        setting.module.zero_grad(set_to_none=True)

    other = family_step.floor(setting, window) + 1
    with (
        patch.dict(family_step.METHODS, floor=lambda *_: other),
        pytest.raises(SystemExit, match="the floor has losses"),
    ):
        family_step.measure(setting, shape, "fp32", budget=0, deadline=0)
