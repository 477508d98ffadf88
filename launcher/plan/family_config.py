"""A family's ``config.json``, with the values that transformers (5.23) fills in where the file has none.

Without torch, which transformers' own classes need; a test compares the values with theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkd.errors import CheckpointError
from alignkd.models.families.table import text_section
from alignkd.models.json_file import read_json

_LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,  # as many as query heads
    "head_dim": None,  # hidden_size / num_attention_heads
}
_QWEN2 = _LLAMA | {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32}
_SIGLIP: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
}
_IDEFICS = _SIGLIP | {"hidden_size": 1152, "patch_size": 32}
_QWEN_VISION: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
}
TEXT: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8},
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | {"head_dim": 128},
    "gemma3_text": {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
    },
    "qwen2_5_vl_text": {
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": None,
    },
    "qwen3_vl_text": _QWEN2 | {"head_dim": 128},
}
VISION: dict[str, dict[str, Any]] = {
    "clip_vision_model": _SIGLIP | {"patch_size": 32},
    "siglip_vision_model": _SIGLIP | {"vision_use_head": True},
    "idefics3_vision": _IDEFICS,
    "smolvlm_vision": _IDEFICS,
    "internvl_vision": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "image_size": [448, 448],
        "patch_size": [14, 14],
        "num_channels": 3,
        "attention_bias": False,
        "use_qk_norm": False,
        "norm_type": "layer_norm",
        "use_mask_token": False,
        "use_absolute_position_embeddings": True,
        "use_mean_pooling": True,
    },
    "qwen2_5_vl_vision": _QWEN_VISION,
    "qwen3_vl_vision": _QWEN_VISION
    | {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "patch_size": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    },
}
# Of each family: the model types of its parts where the file does not name them, and its own values.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llava": (
        "llama",
        "clip_vision_model",
        {"vision_feature_select_strategy": "default", "multimodal_projector_bias": True},
    ),
    "llava_onevision": ("qwen2", "siglip_vision_model", {"multimodal_projector_bias": True}),
    "idefics3": ("llama", "idefics3_vision", {"scale_factor": 2}),
    "smolvlm": ("llama", "smolvlm_vision", {"scale_factor": 2}),
    "internvl": ("qwen2", "internvl_vision", {"downsample_ratio": 0.5, "tie_word_embeddings": True}),
    "qwen2_5_vl": ("qwen2_5_vl_text", "qwen2_5_vl_vision", {}),
    "qwen3_vl": ("qwen3_vl_text", "qwen3_vl_vision", {}),
    "gemma3": (
        "gemma3_text",
        "siglip_vision_model",
        {"mm_tokens_per_image": 256, "tie_word_embeddings": True},
    ),
}
# In these the head is tied also where only the language model's part says so.
TIED_BY_TEXT = ("llava", "llava_onevision", "qwen2_5_vl")
# What changes the tensors and is not known here, with the only value that is.
ONLY = {"attention_bias": False, "mlp_bias": False}


@dataclass(frozen=True)
class FamilyConfig:
    family: str
    whole: dict[str, Any]
    text: dict[str, Any]
    vision: dict[str, Any]
    tied: bool  # head and embeddings are one tensor


def read_family_config(folder: Path, family: str) -> FamilyConfig:
    """Raises CheckpointError for a family, or a part of one, whose tensors are not known here."""
    path = folder / "config.json"
    raw = read_json(path)
    if family not in FAMILIES:
        raise CheckpointError(f"{path}: the sizes of {family} models are not known to `alignkd plan`")
    text_type, vision_type, values = FAMILIES[family]
    given = text_section(raw)
    if given is raw:  # an older file, which has no section for it
        given = raw | {"model_type": text_type}
    whole = values | raw
    text = _filled(path, "text_config", given, TEXT, text_type)
    vision_section = dict(raw.get("vision_config") or {})
    if vision_section.get("model_type") == family:  # older files of the Qwen families
        vision_section["model_type"] = vision_type
    vision = _filled(path, "vision_config", vision_section, VISION, vision_type)
    for key, value in ONLY.items():
        if text.get(key, value) != value:
            raise CheckpointError(
                f"{path}: `text_config.{key}` is not known to `alignkd plan`; valid: {value}"
            )
    tied = bool(whole.get("tie_word_embeddings", False))
    if family in TIED_BY_TEXT:
        tied = tied or bool(text.get("tie_word_embeddings", False))
    return FamilyConfig(family, whole, text, vision, tied)


def _filled(
    path: Path, section: str, given: dict[str, Any], known: dict[str, dict[str, Any]], default: str
) -> dict[str, Any]:
    name = given.get("model_type") or default
    if name not in known:
        raise CheckpointError(
            f"{path}: `{section}.model_type` {name} is not known to `alignkd plan`; known: {', '.join(known)}"
        )
    return {**known[name], **given, "model_type": name}
