"""Find and read the configuration of a vision tower: shapes and preprocessing. Without torch."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

from alignkd.errors import CheckpointError
from alignkd.models.json_file import read_json

PUBLISHED_TOWER = "openai/clip-vit-large-patch14-336"
# Keys missing in a CLIP configuration take transformers' defaults, which are CLIP-B/32's.
TOWER_DEFAULTS: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "image_size": 224,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "num_attention_heads": 12,
    "num_channels": 3,
    "num_hidden_layers": 12,
    "patch_size": 32,
}
PUBLISHED_TOWER_CONFIG: dict[str, Any] = {
    **TOWER_DEFAULTS,
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
}
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
TOWER_SIZES = tuple(key for key, value in TOWER_DEFAULTS.items() if isinstance(value, int))


def find_tower_folder(folder: Path, name: str) -> Path | None:
    """The folder of tower ``name``: inside the model folder, beside it, or in the hub cache."""
    candidates = [Path(name)] if Path(name).is_absolute() else [folder / name, folder.resolve().parent / name]
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return candidate
    return _hub_cache_folder(name)


def _hub_cache_folder(name: str) -> Path | None:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / ("models--" + name.replace("/", "--"))
    snapshots = [path for path in hub.glob("snapshots/*/config.json") if path.is_file()]  # not a broken link
    return max(snapshots, key=lambda path: path.stat().st_mtime).parent if snapshots else None


def tower_by_name(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(configuration, preprocessing) of the tower that ``folder/config.json`` names."""
    found = find_tower_folder(folder, name)
    if found is not None:
        return _read_tower(found)
    if name == PUBLISHED_TOWER:
        return dict(PUBLISHED_TOWER_CONFIG), default_preprocessor(336)
    raise CheckpointError(
        f"{folder / 'config.json'}: the vision tower `{name}` has no config.json in {folder}, beside it, "
        f"or in the hub cache; only `{PUBLISHED_TOWER}` is built in"
    )


def tower_from_folder(folder: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(name, configuration, preprocessing) of a CLIP folder, or of the tower in a MobileVLM folder."""
    raw = read_json(folder / "config.json")
    if "mm_vision_tower" in raw:  # a MobileVLM folder: take its tower
        name = str(raw["mm_vision_tower"])
        return (name, *tower_by_name(folder, name))
    return (portable_tower_name(str(folder.resolve())), *_read_tower(folder))


def portable_tower_name(name: str) -> str:
    """``name`` if it is a path below the model folder, else its last part (or the published name)."""
    path = PurePosixPath(name)
    if not path.is_absolute() and ".." not in path.parts:
        return name
    if "/".join(path.parts[-2:]) == PUBLISHED_TOWER:
        return PUBLISHED_TOWER
    return path.name.strip(".") or "tower"


def _read_tower(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    raw = read_json(folder / "config.json")
    given = raw.get("vision_config", raw)
    if not isinstance(given, dict):
        raise CheckpointError(f"{folder / 'config.json'}: `vision_config` must be a JSON object")
    tower = {key: given.get(key, default) for key, default in TOWER_DEFAULTS.items()}
    edge, file = tower["image_size"], folder / "preprocessor_config.json"
    preprocessor = default_preprocessor(edge)
    if file.is_file():
        preprocessor |= read_json(file)
    # Old files have plain numbers. Teacher and student are compared, so both forms become one.
    size, crop = preprocessor["size"], preprocessor["crop_size"]
    preprocessor["size"] = {"shortest_edge": size} if isinstance(size, int) else size
    preprocessor["crop_size"] = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    if preprocessor["crop_size"] != {"height": edge, "width": edge}:
        raise CheckpointError(f"{file}: `crop_size` is {crop}, but the tower takes {edge} x {edge} pixels")
    return tower, preprocessor


def default_preprocessor(image_size: int) -> dict[str, Any]:
    """CLIP's own preprocessing: shortest edge and centre crop to ``image_size`` pixels, bicubic (3)."""
    return {
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
