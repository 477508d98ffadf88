"""``mmproj.gguf``: vision tower and LDPv2 projector as llama.cpp's ``clip`` architecture.

llama.cpp's graph of the projector has the published models' grid built in: 24 x 24 patches, pooled to 12 x 12
vision tokens. Two defects of its releases since spring 2025 concern these files:

- converter and graph each drop the last layer of the tower (llama.cpp issue 25817). The file therefore holds
  exactly the layers that are used and names the one to read in ``feature_layer``, which is right with and
  without the defect;
- the class token is placed behind the patches (issue 25814), so that patches get each other's positions and
  the first one is lost. A file without the class token avoids this, but its patches do not attend to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from alignkd.errors import CheckpointError
from alignkd.export.gguf_file import GgufTensor, StoredType, Value
from alignkd.models.configuration import MobileVLMConfig
from alignkd.models.families.mobilevlm import PROJECTOR_PREFIX, TOWER_PREFIX
from alignkd.models.weight_files import WeightFiles

ARCHITECTURE = "clip"
GRID, TOKENS_PER_SIDE = 24, 12
CLASS_TOKEN = "embeddings.class_embedding"
POSITIONS = "embeddings.position_embedding.weight"
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
PROJECTOR_NAMES = {
    "mlp.mlp.0": "mm.model.mlp.0",
    "mlp.mlp.2": "mm.model.mlp.2",
    "peg.peg.0": "mm.model.peg.0",
}


def used_layers(config: MobileVLMConfig) -> int:
    """Layers of the tower below the selected hidden state."""
    layers: int = config.mm_vision_select_layer % (config.tower_config["num_hidden_layers"] + 1)
    return layers


def check_tower(config: MobileVLMConfig, where: str) -> None:
    """Raises CheckpointError for a tower that llama.cpp cannot run."""
    grid = config.tower_config["image_size"] // config.tower_config["patch_size"]
    if (grid, config.mm_vision_tokens_per_side) != (GRID, TOKENS_PER_SIDE):
        raise CheckpointError(
            f"{where}: has {grid} x {grid} patches pooled to {config.mm_vision_tokens_per_side} x "
            f"{config.mm_vision_tokens_per_side} vision tokens; llama.cpp's projector `ldpv2` runs "
            f"{GRID} x {GRID} pooled to {TOKENS_PER_SIDE} x {TOKENS_PER_SIDE} only"
        )
    if config.tower_config["hidden_act"] not in ("gelu", "quick_gelu"):
        raise CheckpointError(
            f"{where}: the tower's `hidden_act` is {config.tower_config['hidden_act']!r}; llama.cpp has "
            "gelu and quick_gelu"
        )


def vision_names(config: MobileVLMConfig, *, class_token: bool) -> dict[str, str]:
    """Published name -> name in the file, of the parts that are used."""
    tower = {
        "embeddings.patch_embedding.weight": "v.patch_embd.weight",
        POSITIONS: "v.position_embd.weight",
        "pre_layrnorm.weight": "v.pre_ln.weight",
        "pre_layrnorm.bias": "v.pre_ln.bias",
    }
    if class_token:
        tower[CLASS_TOKEN] = "v.class_embd"
    for layer in range(used_layers(config)):
        for published, ours in LAYER_NAMES.items():
            for part in ("weight", "bias"):
                tower[f"encoder.layers.{layer}.{published}.{part}"] = f"v.blk.{layer}.{ours}.{part}"
    return {TOWER_PREFIX + published: ours for published, ours in tower.items()} | {
        f"{PROJECTOR_PREFIX}{published}.{part}": f"{ours}.{part}"
        for published, ours in PROJECTOR_NAMES.items()
        for part in ("weight", "bias")
    }


def vision_tensors(config: MobileVLMConfig, files: WeightFiles, *, class_token: bool) -> Iterator[GgufTensor]:
    """Matrices and convolutions in f16, everything else in f32, as llama.cpp's kernels expect them."""
    for published, name in vision_names(config, class_token=class_token).items():
        shape, positions = files.shape(published), published == TOWER_PREFIX + POSITIONS
        if positions and not class_token:
            shape = (shape[0] - 1, *shape[1:])  # the first position is the class token's

        stored: StoredType = "f32" if len(shape) == 1 or positions else "f16"
        yield GgufTensor(name, shape, stored, partial(_last_rows, files, published, shape[0]))


def _last_rows(files: WeightFiles, name: str, rows: int) -> torch.Tensor:
    value = files.read(name)
    return value[value.shape[0] - rows :]


def vision_metadata(config: MobileVLMConfig, name: str) -> dict[str, Value]:
    tower, layers = config.tower_config, used_layers(config)
    return {
        "general.name": name,
        "general.file_type": 1,
        "clip.has_text_encoder": False,
        "clip.has_vision_encoder": True,
        "clip.has_llava_projector": True,
        "clip.projector_type": "ldpv2",
        "clip.use_gelu": tower["hidden_act"] == "gelu",
        "clip.vision.image_size": tower["image_size"],
        "clip.vision.patch_size": tower["patch_size"],
        "clip.vision.embedding_length": tower["hidden_size"],
        "clip.vision.feed_forward_length": tower["intermediate_size"],
        "clip.vision.projection_dim": config.hidden_size,
        "clip.vision.attention.head_count": tower["num_attention_heads"],
        "clip.vision.attention.layer_norm_epsilon": float(tower["layer_norm_eps"]),
        "clip.vision.block_count": layers,
        "clip.vision.feature_layer": [layers],
        "clip.vision.image_mean": [float(value) for value in config.preprocessor_config["image_mean"]],
        "clip.vision.image_std": [float(value) for value in config.preprocessor_config["image_std"]],
    }
