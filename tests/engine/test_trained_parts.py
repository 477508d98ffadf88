"""``student.train``: which parts of the student change, in both kinds of model and on real ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alignkd.models.building import BuildOptions
from alignkd.models.families.interface import VisionLanguageModel
from alignkd.models.loading import load_model
from tests import tiny, vlm
from tests.engine.test_training_run import train_run
from tests.ranks import RankPool

FOLDERS: dict[str, Callable[[], Path]] = {
    "mobilevlm": lambda: tiny.STUDENT,
    **{family: (lambda family=family: vlm.folder(family)) for family in vlm.FAMILIES},
}


def part_by_name(name: str) -> str:
    """By the names that the models give their modules."""
    if any(word in name for word in ("projector", "connector", "merger", "embed_vision")):
        return "projector"
    if "vision_tower" in name or "vision_model" in name or "visual" in name:
        return "vision_tower"
    return "language_model"


def trained(model: VisionLanguageModel) -> set[str]:
    return {part_by_name(name) for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("family", FOLDERS)
def test_each_part_is_frozen_unless_it_is_named(family: str) -> None:
    model = load_model(FOLDERS[family](), BuildOptions(torch.float32))
    whole = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained(model) == {"projector", "language_model"}
    model.freeze_all_but(["projector", "language_model"])
    assert {name for name, value in model.named_parameters() if value.requires_grad} == whole
    model.freeze_all_but(["language_model"])
    assert trained(model) == {"language_model"}
    model.freeze_all_but([])
    assert trained(model) == set()
    model.unfreeze_vision_tower()
    model.freeze_all_but([])
    assert trained(model) == {"vision_tower"}


@pytest.mark.parametrize("part", ["projector", "language_model"])
@pytest.mark.parametrize("family", ["mobilevlm", "smolvlm"])
def test_a_run_changes_the_named_part_and_nothing_else(
    two_ranks: RankPool, tmp_path: Path, family: str, part: str
) -> None:
    """At ZeRO stage 2 and 3, on ranks of which some have no image."""
    changes = {"student__train": [part], "student__zero_stage": 2 if part == "projector" else 3}
    if family == "mobilevlm":
        run = tiny.write_run(tmp_path / "run", 2, **changes)
        before = torch.load(tiny.STUDENT / "pytorch_model.bin", weights_only=True)
    else:
        run = vlm.write_run(tmp_path / "run", 2, family, **changes)
        before = load_file(vlm.folder(family) / "model.safetensors")
    assert two_ranks.run(train_run, str(run)) == [0, 0]
    after = load_file(run / "student" / "model.safetensors")
    assert after.keys() == before.keys()
    moved = {name for name, value in after.items() if not value.equal(before[name].to(value.dtype))}
    assert {part_by_name(name) for name in moved} == {part}
    rows = tiny.metrics_rows(run)
    assert rows[-1]["gradient_norm"] > 0
