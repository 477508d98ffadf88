"""What a model folder says about itself, read without torch (the launcher needs it on a login node).

The format is MobileVLM V2's ``config.json``: LLaMA's keys, the ``mm_*`` keys of the vision side, and the name
of a CLIP tower whose own ``config.json`` is looked up (see :func:`find_tower_folder`). One key is ours:
``mm_vision_tokens_per_side``, the pooled grid of the projector, 12 in all published models.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkd.errors import CheckpointError

PUBLISHED_TOWER = "openai/clip-vit-large-patch14-336"
PUBLISHED_TOWER_CONFIG: dict[str, Any] = {
    "hidden_act": "quick_gelu",
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 24,
    "patch_size": 14,
}
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
TOWER_KEYS = (*PUBLISHED_TOWER_CONFIG, "attention_dropout")
LLAMA_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)


@dataclass(frozen=True)
class MobileVLMConfig:
    """Shapes and names of one model. ``raw`` is its config.json, kept so that a save loses nothing."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    initializer_range: float
    mm_hidden_size: int
    mm_vision_tower: str
    mm_vision_select_layer: int
    mm_vision_tokens_per_side: int
    image_aspect_ratio: str
    tower_config: dict[str, Any]
    preprocessor_config: dict[str, Any]
    raw: dict[str, Any]

    @property
    def vision_tokens(self) -> int:
        """V: vision tokens of one image after pooling."""
        return self.mm_vision_tokens_per_side**2


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a model folder needs it") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return value


def read_model_config(folder: Path | str, vision_tower: Path | str | None = None) -> MobileVLMConfig:
    """Read ``folder/config.json``. ``vision_tower`` (a CLIP or a MobileVLM folder) completes a plain LLaMA
    folder or replaces the tower that the file names.

    Raises CheckpointError for missing keys and for variants that the models here do not implement.
    """
    folder = Path(folder)
    path = folder / "config.json"
    raw = read_json(path)
    if vision_tower is not None:
        name, tower, preprocessor = _tower_from_folder(Path(vision_tower))
        raw = {**raw, "mm_vision_tower": name, "mm_hidden_size": tower["hidden_size"]}
    elif "mm_vision_tower" in raw:
        tower, preprocessor = _tower_by_name(folder, str(raw["mm_vision_tower"]))
    else:
        raise CheckpointError(
            f"{path}: a plain LLaMA folder has no vision tower; name one in model.vision_tower "
            "(a CLIP folder or a MobileVLM folder)"
        )
    _refuse_variants(path, raw, tower)
    raw = {**raw, "model_type": "mobilevlm", "architectures": ["MobileLlamaForCausalLM"]}
    heads = int(raw["num_attention_heads"])
    return MobileVLMConfig(
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_hidden_layers=int(raw["num_hidden_layers"]),
        num_attention_heads=heads,
        num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
        max_position_embeddings=int(raw["max_position_embeddings"]),
        rms_norm_eps=float(raw["rms_norm_eps"]),
        rope_theta=float(raw.get("rope_theta") or 10000.0),
        initializer_range=float(raw.get("initializer_range", 0.02)),
        mm_hidden_size=int(raw.get("mm_hidden_size", tower["hidden_size"])),
        mm_vision_tower=str(raw["mm_vision_tower"]),
        mm_vision_select_layer=int(raw.get("mm_vision_select_layer", -2)),
        mm_vision_tokens_per_side=int(raw.get("mm_vision_tokens_per_side", 12)),
        image_aspect_ratio=str(raw.get("image_aspect_ratio", "pad")),
        tower_config=tower,
        preprocessor_config=preprocessor,
        raw=raw,
    )


def find_tower_folder(folder: Path, name: str) -> Path | None:
    """Where the configuration of tower ``name`` lies: in the model folder, beside it, or in the hub cache."""
    candidates = [Path(name)] if Path(name).is_absolute() else [folder / name, folder.resolve().parent / name]
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return candidate
    return _hub_cache_folder(name)


def _hub_cache_folder(name: str) -> Path | None:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / ("models--" + name.replace("/", "--"))
    snapshots = sorted(hub.glob("snapshots/*/config.json"), key=lambda path: path.stat().st_mtime)
    return snapshots[-1].parent if snapshots else None


def _tower_by_name(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    found = find_tower_folder(folder, name)
    if found is not None:
        return _read_tower(found)
    if name == PUBLISHED_TOWER:
        return dict(PUBLISHED_TOWER_CONFIG), default_preprocessor(336)
    raise CheckpointError(
        f"{folder / 'config.json'}: the vision tower `{name}` has no config.json in {folder}, beside it, "
        f"or in the hub cache; only `{PUBLISHED_TOWER}` is built in"
    )


def _tower_from_folder(folder: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    raw = read_json(folder / "config.json")
    if "mm_vision_tower" in raw:  # a MobileVLM folder: its tower is meant
        name = str(raw["mm_vision_tower"])
        return (name, *_tower_by_name(folder, name))
    # The name is what a save of the completed model refers to; the published one keeps its two parts.
    parts = folder.resolve().parts
    name = PUBLISHED_TOWER if "/".join(parts[-2:]) == PUBLISHED_TOWER else parts[-1]
    return (name, *_read_tower(folder))


def _read_tower(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    raw = read_json(folder / "config.json")
    vision = {**PUBLISHED_TOWER_CONFIG, **raw.get("vision_config", raw)}
    tower = {key: vision[key] for key in TOWER_KEYS if key in vision}
    preprocessor = folder / "preprocessor_config.json"
    image_size = int(tower["image_size"])
    return tower, read_json(preprocessor) if preprocessor.is_file() else default_preprocessor(image_size)


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


def _refuse_variants(path: Path, raw: dict[str, Any], tower: dict[str, Any]) -> None:
    problems = [f"`{key}` is missing" for key in LLAMA_KEYS if key not in raw]
    only = {
        "mm_projector_type": "ldpnetv2",
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tie_word_embeddings": False,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    problems += [
        f"`{key}` is {raw[key]!r}; only {value!r} is supported"
        for key, value in only.items()
        if key in raw and raw[key] != value
    ]
    if "mm_hidden_size" in raw and raw["mm_hidden_size"] != tower["hidden_size"]:
        problems.append(
            f"`mm_hidden_size` is {raw['mm_hidden_size']}, the tower's width is {tower['hidden_size']}"
        )
    side = raw.get("mm_vision_tokens_per_side", 12)
    patches = tower["image_size"] // tower["patch_size"]
    if not isinstance(side, int) or not 1 <= side <= patches:
        problems.append(
            f"`mm_vision_tokens_per_side` is {side!r}; valid: 1 to {patches} (the tower's patches per side)"
        )
    if problems:
        raise CheckpointError(f"{path}: " + "; ".join(problems))
