"""What the plan takes as trained, against the real models of all families that it knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alignkd.config import load_config
from alignkd.config.schema import LoraSection
from alignkd.engine.build import choose_trained_parts
from alignkd.models.building import BuildOptions
from alignkd.models.loading import load_model
from launcher.plan.family_config import FAMILIES
from launcher.plan.sizes import run_sizes
from launcher.plan.trained import Trained, trained_parts
from launcher.plan.weights import weight_notes
from tests import tiny, vlm

CHOICES: dict[str, dict[str, Any]] = {
    "both": {},
    "projector": {"student__train": ["projector"]},
    "language model": {"student__train": ["language_model"]},
    "tower": {"student__train": [], "training__train_vision_tower": True},
    "lora": {"student__lora": {"rank": 3}},
    "lora alone": {"student__lora": {"rank": 3}, "student__train": ["language_model"]},
}


def planned_and_real(tmp_path: Path, family: str, **changes: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Elements of the student's trained tensors, and of all of them."""
    if family == "mobilevlm":
        run, folder = tiny.write_run(tmp_path / "run", 1, **changes), tiny.STUDENT
    else:
        run, folder = vlm.write_run(tmp_path / "run", 1, family, **changes), vlm.folder(family)
    config = load_config(run / "config.yaml")
    sizes = run_sizes(config)
    assert weight_notes(config, sizes) == []
    model = load_model(folder, BuildOptions(torch.float32))
    choose_trained_parts(model, config)
    real = {"trained": 0, "all": 0}
    for parameter in model.parameters():
        real["all"] += parameter.numel()
        real["trained"] += parameter.numel() if parameter.requires_grad else 0
    trained = sizes.student.trainable(trained_parts(config))
    frozen = sum(sizes.frozen(config).values())
    return {"trained": sum(trained.values()), "all": sum(trained.values()) + frozen}, real


@pytest.mark.parametrize("choice", CHOICES)
def test_trained_numbers_are_those_of_the_engine_s_student(choice: str, tmp_path: Path) -> None:
    planned, real = planned_and_real(tmp_path, "mobilevlm", **CHOICES[choice])
    assert planned == real


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("choice", ["projector", "lora"])
def test_trained_numbers_of_other_families_are_those_of_their_students(
    family: str, choice: str, tmp_path: Path
) -> None:
    planned, real = planned_and_real(tmp_path, family, **CHOICES[choice])
    assert planned == real


def test_gradients_pass_through_what_lies_above_a_trained_part() -> None:
    names = ("vision_tower.a", "projector.a", "language_model.embed_tokens.weight", "head.weight")

    def passed(trained: Trained) -> list[str]:
        return [name for name in names if trained.is_in_backward(name)]

    assert passed(Trained()) == list(names[1:])
    assert passed(Trained(language_model=False)) == ["projector.a", "head.weight"]
    assert passed(Trained(False, projector=False, lora_rank=2)) == ["head.weight"]
    assert passed(Trained(False, projector=False, vision_tower=True)) == [*names[:2], "head.weight"]


def test_lora_s_default_rank_is_the_schema_s(tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run", 1, student__lora={})
    assert trained_parts(load_config(run / "config.yaml")).lora_rank == LoraSection().rank
