"""Parameter counts without torch, against the real modules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers.initialization import no_init_weights

from alignkd.models.adapters import AlignmentAdapters
from alignkd.models.configuration import MobileVLMConfig, read_model_config
from alignkd.models.families.mobilevlm import MobileVLM
from launcher.plan.shapes import mobilevlm_shapes
from launcher.plan.sizes import adapter_sizes, model_sizes
from launcher.plan.trained import Trained
from tests import tiny
from tests.model_folders import copy_model
from tests.models.test_configuration import PUBLISHED, SHAPE_KEYS, SIZES


def module_of(config: MobileVLMConfig) -> MobileVLM:
    with torch.device("meta"), no_init_weights():
        return MobileVLM(config)


def published(folder: Path, size: str) -> MobileVLMConfig:
    _, shape, _ = SIZES[["1.7B", "3B", "7B"].index(size)]
    (folder / "config.json").write_text(
        json.dumps({**PUBLISHED, **dict(zip(SHAPE_KEYS, shape, strict=True))})
    )
    return read_model_config(folder)


@pytest.mark.parametrize(
    ("total", "size"), [(row[0], name) for row, name in zip(SIZES, ["1.7B", "3B", "7B"], strict=True)]
)
def test_the_published_models_have_the_published_sizes(tmp_path: Path, total: int, size: str) -> None:
    sizes = model_sizes(published(tmp_path, size))
    assert sizes.count() == total
    assert sizes.count("vision_tower.") == 303_507_456
    assert sizes.shapes.vision.layers == 23


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}, {"mm_vision_select_layer": -1}])
def test_every_tensor_of_the_real_modules_is_counted(tmp_path: Path, changes: dict[str, int]) -> None:
    config = read_model_config(copy_model(tmp_path / "model", **changes))
    sizes, module = model_sizes(config), module_of(config)
    assert sizes.tensors == {name: parameter.numel() for name, parameter in module.named_parameters()}
    for train_tower in (False, True):
        if train_tower:
            module.unfreeze_vision_tower()
        real = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        assert set(sizes.trainable(Trained(vision_tower=train_tower))) == real


def test_every_tensor_of_the_adapters_is_counted() -> None:
    teacher, student = read_model_config(tiny.TEACHER), read_model_config(tiny.STUDENT)
    module = AlignmentAdapters(teacher, student)
    real = {f"adapters.{name}": parameter.numel() for name, parameter in module.named_parameters()}
    assert adapter_sizes(mobilevlm_shapes(teacher), mobilevlm_shapes(student)) == real
