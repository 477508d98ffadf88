"""Write a model in the published MobileVLM V2 format: config.json, weights, tokenizer, tower's facts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from alignkd.models.configuration import MobileVLMConfig

FileFormat = Literal["safetensors", "bin"]


def save_model_folder(
    out: Path,
    config: MobileVLMConfig,
    tensors: Mapping[str, torch.Tensor],
    tokenizer_folder: Path,
    file_format: FileFormat = "safetensors",
) -> None:
    """``tensors`` carry published names and the dtype to save in. The folder appears whole or not at all."""
    partial = out.with_name(out.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if file_format == "safetensors":
        save_file(
            {name: value.contiguous() for name, value in tensors.items()},
            partial / "model.safetensors",
            {"format": "pt"},
        )
    else:
        torch.save(dict(tensors), partial / "pytorch_model.bin")
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    _write_json(partial / "config.json", {**config.raw, "torch_dtype": dtype})
    for path in sorted(tokenizer_folder.glob("*token*")):
        if path.is_file():
            shutil.copyfile(path, partial / path.name)
    # The tower's shape and preprocessing travel along, under the name that config.json gives it.
    tower = (
        partial / Path(config.mm_vision_tower).name
        if Path(config.mm_vision_tower).is_absolute()
        else partial / config.mm_vision_tower
    )
    tower.mkdir(parents=True, exist_ok=True)
    _write_json(tower / "config.json", {"model_type": "clip_vision_model", **config.tower_config})
    _write_json(tower / "preprocessor_config.json", config.preprocessor_config)
    partial.rename(out)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
