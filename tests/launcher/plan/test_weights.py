"""Parameter counts from safetensors headers against a model's configuration."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from alignkd.config import Config
from launcher.plan.sizes import run_sizes
from launcher.plan.weights import parameters_on_disk, weight_notes
from tests.model_folders import copy_model, published_tensors


def test_parameters_are_counted_from_safetensors_headers(tmp_path: Path) -> None:
    assert parameters_on_disk(tmp_path) is None
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, tmp_path / "one.safetensors")
    save_file({"c": torch.zeros(())}, tmp_path / "two.safetensors")
    assert parameters_on_disk(tmp_path) == 18
    (tmp_path / "three.safetensors").write_bytes(b"\xff" * 20)
    assert parameters_on_disk(tmp_path) is None


def test_a_folder_that_does_not_match_its_configuration_is_reported(make_config, tmp_path: Path) -> None:
    folder = copy_model(tmp_path / "model")
    for path in folder.glob("*.bin"):
        path.unlink()
    tensors = {name: value.contiguous() for name, value in published_tensors().items()}
    save_file(tensors, folder / "model.safetensors")
    config: Config = make_config(f"model.student={folder}")
    sizes = run_sizes(config)
    assert weight_notes(config, sizes) == []
    save_file(tensors | {"more": torch.zeros(7)}, folder / "model.safetensors")
    count = sizes.student.count()
    assert weight_notes(config, sizes) == [
        f"{folder}: its files hold {count + 7:,} parameters, its config.json describes {count:,}"
    ]
