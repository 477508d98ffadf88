"""The tensors of the vision towers of transformers' families, without the mergers that project."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from launcher.plan.tensors import linear, norm

Vision = dict[str, Any]


def side(size: Any) -> int:
    return int(size[0] if isinstance(size, list | tuple) else size)


def grid(vision: Vision) -> int:
    """Patches of an image, or of a tile, at the tower's size."""
    return (side(vision["image_size"]) // side(vision["patch_size"])) ** 2


def is_qwen(vision: Vision) -> bool:
    return "depth" in vision


def _patch_weight(vision: Vision) -> int:
    return int(vision["hidden_size"] * vision["num_channels"] * side(vision["patch_size"]) ** 2)


def _encoder(vision: Vision) -> dict[str, int]:
    """Of CLIP's and SigLIP's kind."""
    width, mlp = vision["hidden_size"], vision["intermediate_size"]
    tensors: dict[str, int] = {}
    for layer in range(vision["num_hidden_layers"]):
        own = f"encoder.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors |= linear(f"{own}self_attn.{name}", width, width)
        tensors |= linear(f"{own}mlp.fc1", width, mlp) | linear(f"{own}mlp.fc2", mlp, width)
        tensors |= norm(f"{own}layer_norm1", width) | norm(f"{own}layer_norm2", width)
    return tensors | norm("post_layernorm", width)


def _clip(vision: Vision) -> dict[str, int]:
    width = vision["hidden_size"]
    return {
        "embeddings.class_embedding": width,
        "embeddings.patch_embedding.weight": _patch_weight(vision),
        "embeddings.position_embedding.weight": (grid(vision) + 1) * width,
        **norm("pre_layrnorm", width),
        **_encoder(vision),
    }


def _siglip(vision: Vision) -> dict[str, int]:
    width, mlp = vision["hidden_size"], vision["intermediate_size"]
    tensors = {
        "embeddings.patch_embedding.weight": _patch_weight(vision),
        "embeddings.patch_embedding.bias": width,
        "embeddings.position_embedding.weight": grid(vision) * width,
        **_encoder(vision),
    }
    if not vision.get("vision_use_head", False):
        return tensors
    return tensors | {
        "head.probe": width,
        "head.attention.in_proj_weight": 3 * width * width,
        "head.attention.in_proj_bias": 3 * width,
        **linear("head.attention.out_proj", width, width),
        **norm("head.layernorm", width),
        **linear("head.mlp.fc1", width, mlp),
        **linear("head.mlp.fc2", mlp, width),
    }


def _internvl(vision: Vision) -> dict[str, int]:
    width, mlp = vision["hidden_size"], vision["intermediate_size"]
    tensors = {
        "embeddings.cls_token": width,
        "embeddings.patch_embeddings.projection.weight": _patch_weight(vision),
        "embeddings.patch_embeddings.projection.bias": width,
    }
    if vision["use_mask_token"]:
        tensors["embeddings.mask_token"] = width
    if vision["use_absolute_position_embeddings"]:
        tensors["embeddings.position_embeddings"] = (grid(vision) + 1) * width
    is_rms = vision["norm_type"] == "rms_norm"
    for layer in range(vision["num_hidden_layers"]):
        own = f"encoder.layer.{layer}."
        tensors |= {f"{own}lambda_{n}": width for n in (1, 2)}
        for name in ("q_proj", "k_proj", "v_proj"):
            tensors |= linear(f"{own}attention.{name}", width, width, bias=vision["attention_bias"])
        if vision["use_qk_norm"]:
            tensors |= {f"{own}attention.{name}_norm.weight": width for name in "qk"}
        tensors |= linear(f"{own}attention.projection_layer", width, width)
        tensors |= linear(f"{own}mlp.fc1", width, mlp) | linear(f"{own}mlp.fc2", mlp, width)
        for name in ("layernorm_before", "layernorm_after"):
            tensors |= {f"{own}{name}.weight": width} if is_rms else norm(f"{own}{name}", width)
    return tensors if vision["use_mean_pooling"] else tensors | norm("layernorm", width)


def _qwen_patches(vision: Vision) -> int:
    size = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    return int(vision["hidden_size"] * size)


def _qwen2_5_vl(vision: Vision) -> dict[str, int]:
    width, mlp = vision["hidden_size"], vision["intermediate_size"]
    tensors = {"patch_embed.proj.weight": _qwen_patches(vision)}
    for layer in range(vision["depth"]):
        own = f"blocks.{layer}."
        tensors |= {f"{own}norm{n}.weight": width for n in (1, 2)}
        tensors |= linear(f"{own}attn.qkv", width, 3 * width) | linear(f"{own}attn.proj", width, width)
        for name in ("gate_proj", "up_proj"):
            tensors |= linear(f"{own}mlp.{name}", width, mlp)
        tensors |= linear(f"{own}mlp.down_proj", mlp, width)
    return tensors


def _qwen3_vl(vision: Vision) -> dict[str, int]:
    width, mlp = vision["hidden_size"], vision["intermediate_size"]
    tensors = {
        "patch_embed.proj.weight": _qwen_patches(vision),
        "patch_embed.proj.bias": width,
        "pos_embed.weight": vision["num_position_embeddings"] * width,
    }
    for layer in range(vision["depth"]):
        own = f"blocks.{layer}."
        tensors |= norm(f"{own}norm1", width) | norm(f"{own}norm2", width)
        tensors |= linear(f"{own}attn.qkv", width, 3 * width) | linear(f"{own}attn.proj", width, width)
        tensors |= linear(f"{own}mlp.linear_fc1", width, mlp) | linear(f"{own}mlp.linear_fc2", mlp, width)
    return tensors


TOWERS: dict[str, Callable[[Vision], dict[str, int]]] = {
    "clip_vision_model": _clip,
    "siglip_vision_model": _siglip,
    "idefics3_vision": _siglip,
    "smolvlm_vision": _siglip,
    "internvl_vision": _internvl,
    "qwen2_5_vl_vision": _qwen2_5_vl,
    "qwen3_vl_vision": _qwen3_vl,
}
