"""Folders of the sample task's models: tiny configurations in the public format, and a random CLIP tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from alignkd.data.sample_task.digits import IMAGE_SIDE
from alignkd.data.sample_task.tokenizer import VOCABULARY
from alignkd.models.tower import default_preprocessor

TOWER = "tower"  # `mm_vision_tower` of the models; a folder beside theirs
TOWER_WIDTH = 96
TOWER_LAYERS = 4  # the last one is not used: MobileVLM reads hidden state -2
PATCH = 4  # pixels; 8 x 8 patches, which the projector pools to 4 x 4 vision tokens

TOWER_CONFIG: dict[str, Any] = {
    "architectures": ["CLIPVisionModel"],
    "model_type": "clip_vision_model",
    "attention_dropout": 0.0,
    "hidden_act": "quick_gelu",
    "hidden_size": TOWER_WIDTH,
    "image_size": IMAGE_SIDE,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 2 * TOWER_WIDTH,
    "layer_norm_eps": 1e-05,
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_hidden_layers": TOWER_LAYERS,
    "patch_size": PATCH,
    "projection_dim": TOWER_WIDTH,
}

PREPROCESSOR_CONFIG: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    **default_preprocessor(IMAGE_SIDE),
}


def model_config(hidden_size: int, layers: int, heads: int) -> dict[str, Any]:
    """A MobileVLM V2 ``config.json`` with 4 x 4 vision tokens."""
    return {
        "architectures": ["MobileLlamaForCausalLM"],
        "model_type": "mobilevlm",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 256,
        "initializer_range": 0.06,  # 0.02 suits wide models; a width of 128 starts much faster from this
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": TOWER_WIDTH,
        "mm_projector_type": "ldpnetv2",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tokens_per_side": 4,
        "mm_vision_tower": TOWER,
        "vision_tower_type": "clip",
        "torch_dtype": "float32",
    }


TEACHER_CONFIG = model_config(hidden_size=128, layers=4, heads=4)
STUDENT_CONFIG = model_config(hidden_size=96, layers=2, heads=3)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_model_folder(folder: Path, config: dict[str, Any], tokenizer: bytes) -> None:
    """Write ``config.json`` and ``tokenizer.model``, all that a model trained from scratch needs."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    (folder / "tokenizer.model").write_bytes(tokenizer)


def write_tower_folder(folder: Path, seed: int) -> None:
    """Write a CLIP vision tower with seeded random weights, initialised as in CLIP."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", TOWER_CONFIG)
    write_json(folder / "preprocessor_config.json", PREPROCESSOR_CONFIG)
    save_file(_tower_weights(seed), folder / "model.safetensors", metadata={"format": "pt"})


def _tower_weights(seed: int) -> dict[str, npt.NDArray[np.float32]]:
    random = np.random.default_rng([seed, 1])
    width, inner = TOWER_WIDTH, 2 * TOWER_WIDTH
    narrow = width**-0.5 * (2 * TOWER_LAYERS) ** -0.5  # keeps the residual stream's scale over the depth
    weights: dict[str, npt.NDArray[np.float32]] = {}

    def normal(name: str, shape: tuple[int, ...], deviation: float) -> None:
        weights[name] = (random.standard_normal(shape) * deviation).astype(np.float32)

    def linear(name: str, rows: int, columns: int, deviation: float) -> None:
        normal(f"{name}.weight", (rows, columns), deviation)
        weights[f"{name}.bias"] = np.zeros(rows, dtype=np.float32)

    def norm(name: str) -> None:
        weights[f"{name}.weight"] = np.ones(width, dtype=np.float32)
        weights[f"{name}.bias"] = np.zeros(width, dtype=np.float32)

    root = "vision_model"
    patches = (IMAGE_SIDE // PATCH) ** 2
    normal(f"{root}.embeddings.class_embedding", (width,), width**-0.5)
    normal(f"{root}.embeddings.patch_embedding.weight", (width, 3, PATCH, PATCH), 0.02)
    normal(f"{root}.embeddings.position_embedding.weight", (patches + 1, width), 0.02)
    norm(f"{root}.pre_layrnorm")
    for index in range(TOWER_LAYERS):
        layer = f"{root}.encoder.layers.{index}"
        norm(f"{layer}.layer_norm1")
        for name in ("q_proj", "k_proj", "v_proj"):
            linear(f"{layer}.self_attn.{name}", width, width, narrow)
        linear(f"{layer}.self_attn.out_proj", width, width, width**-0.5)
        norm(f"{layer}.layer_norm2")
        linear(f"{layer}.mlp.fc1", inner, width, (2 * width) ** -0.5)
        linear(f"{layer}.mlp.fc2", width, inner, narrow)
    norm(f"{root}.post_layernorm")
    return weights
