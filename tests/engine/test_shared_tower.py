"""When one vision tower serves both models, and the reasons why it does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from alignkd.distributed.ranks import Ranks
from alignkd.engine.shared_tower import reason_for_own_tower
from alignkd.models.building import BuildOptions
from alignkd.models.configuration import read_model_config
from alignkd.models.loading import load_model
from tests import tiny
from tests.ranks import RankPool


def reasons(ranks: Ranks) -> dict[str, str | None]:
    teacher = load_model(tiny.TEACHER, BuildOptions(torch.float32))

    def reason(precision: torch.dtype = torch.float32, **config: Any) -> str | None:
        student = load_model(tiny.STUDENT, BuildOptions(precision))
        if config:
            student.config = replace(student.config, **config)
        return reason_for_own_tower(teacher, student, ranks)

    def with_changed(part: str) -> str | None:
        student = load_model(tiny.STUDENT, BuildOptions(torch.float32))
        change_one_number(student.get_submodule(part))
        return reason_for_own_tower(teacher, student, ranks)

    trained = load_model(tiny.STUDENT, BuildOptions(torch.float32))
    trained.unfreeze_vision_tower()
    tower = read_model_config(tiny.STUDENT).tower_config
    return {
        "same": reason(),
        "trained": reason_for_own_tower(teacher, trained, ranks),
        "precision": reason(torch.bfloat16),
        "layer": reason(mm_vision_select_layer=-1),
        "same layer": reason(mm_vision_select_layer=tower["num_hidden_layers"] - 1),
        "shape": reason(tower_config={**tower, "layer_norm_eps": 1e-3}),
        "weights": with_changed("vision_tower.encoder.layers.0.mlp.fc1"),
        "unused weights": with_changed("vision_tower.encoder.layers.2.mlp.fc1"),
        "projector": with_changed("projector"),
    }


def change_one_number(module: torch.nn.Module) -> None:
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] += 1e-3


def test_only_an_equal_frozen_tower_is_shared(one_rank: RankPool) -> None:
    (found,) = one_rank.run(reasons)
    shared = {name for name, reason in found.items() if reason is None}
    assert shared == {"same", "same layer", "unused weights", "projector"}
    assert "trained" in str(found["trained"])
    assert "bfloat16" in str(found["precision"])
    assert "mm_vision_select_layer" in str(found["layer"])
    assert "configurations" in str(found["shape"])
    assert "weights" in str(found["weights"])
