"""Model folders for tests: copies of the fixture in other layouts, with other content, or taken apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests import tiny

TOWER_NAME = "openai/clip-tiny-patch14-336"
TOWER = tiny.FOLDER / TOWER_NAME
TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."
PROJECTOR_PREFIX = "model.mm_projector."
LAYOUTS = ("safetensors", "bin", "old bin", "sharded safetensors", "sharded bin")


def published_tensors(folder: Path = tiny.STUDENT) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = torch.load(folder / "pytorch_model.bin", weights_only=True)
    return tensors


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], layout: str = "safetensors") -> None:
    suffix = "safetensors" if "safetensors" in layout else "bin"
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    if not layout.startswith("sharded"):
        _write_file(folder / f"{stem}.{suffix}", tensors, layout)
        return
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):  # layers are torn apart, on purpose
        file = f"{stem}-{number:05}-of-00002.{suffix}"
        _write_file(folder / file, {name: tensors[name] for name in part}, layout)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def _write_file(path: Path, tensors: dict[str, torch.Tensor], layout: str) -> None:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=layout != "old bin")


def change_json(path: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: entry for key, entry in value.items() if key not in drop}))


def copy_model(
    out: Path, tensors: dict[str, torch.Tensor] | None = None, source: Path = tiny.STUDENT, **changes: Any
) -> Path:
    """A complete folder with its tower's configuration inside; ``changes`` go into config.json."""
    out.mkdir(parents=True)
    shutil.copytree(TOWER, out / TOWER_NAME, ignore=shutil.ignore_patterns("*.bin"))
    shutil.copyfile(source / "config.json", out / "config.json")
    shutil.copyfile(source / "tokenizer.model", out / "tokenizer.model")
    change_json(out / "config.json", **changes)
    write_weights(out, published_tensors(source) if tensors is None else tensors)
    return out


def plain_llama(out: Path) -> Path:
    """The student as a plain LLaMA folder: no tower, no projector, no trace of them in config.json."""
    vision = (TOWER_PREFIX, PROJECTOR_PREFIX)
    tensors = {name: value for name, value in published_tensors().items() if not name.startswith(vision)}
    copy_model(out, tensors)
    shutil.rmtree(out / "openai")
    raw = json.loads((out / "config.json").read_text())
    ours = tuple(key for key in raw if key.startswith(("mm_", "vision_tower", "image_")))
    change_json(out / "config.json", drop=ours, model_type="llama", architectures=["LlamaForCausalLM"])
    return out
