"""Shapes of published models of transformers' families, as their ``config.json`` have them.

Written down from memory of these files; keys that change no tensor are left out.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "patch_size": 14,
    "vision_use_head": False,
}
_SMOLVLM_VISION = {
    "model_type": "smolvlm_vision",
    "hidden_size": 768,
    "num_attention_heads": 12,
    "image_size": 512,
    "patch_size": 16,
}
_INTERNVIT = {
    "model_type": "internvl_vision",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "attention_bias": True,
    "image_size": [448, 448],
    "patch_size": [14, 14],
}


def _text(kind: str, sizes: tuple[int, int, int, int, int], **others: Any) -> dict[str, Any]:
    """``sizes``: width, width of the MLP, layers, heads, key heads."""
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    return {"model_type": kind, **dict(zip(names, sizes, strict=True)), **others}


def _llava(**text: Any) -> dict[str, Any]:
    llama = {"model_type": "llama", "vocab_size": 32064, **text}
    return {"model_type": "llava", "text_config": llama, "vision_config": _CLIP, "image_token_index": 32000}


def _onevision(text: dict[str, Any]) -> dict[str, Any]:
    vision = _SIGLIP | {"image_size": 384, "num_hidden_layers": 26}
    return {"model_type": "llava_onevision", "text_config": text, "vision_config": vision}


def _smolvlm(kind: str, text: dict[str, Any]) -> dict[str, Any]:
    vision = _SMOLVLM_VISION | {"model_type": f"{kind}_vision"}
    text = text | {"vocab_size": 49280}
    return {"model_type": kind, "text_config": text, "vision_config": vision, "scale_factor": 4}


def _internvl(text: dict[str, Any]) -> dict[str, Any]:
    text = text | {"vocab_size": 151674, "tie_word_embeddings": False}
    top = {"model_type": "internvl", "tie_word_embeddings": False}
    return {**top, "text_config": text, "vision_config": _INTERNVIT}


def _qwen2_5_vl(text: dict[str, Any]) -> dict[str, Any]:
    """Its files have no section for the language model."""
    vision = {"model_type": "qwen2_5_vl", "depth": 32, "hidden_size": 1280, "intermediate_size": 3420}
    vision |= {"num_heads": 16, "out_hidden_size": text["hidden_size"]}
    return {**text, "model_type": "qwen2_5_vl", "vision_config": vision, "image_token_id": 151655}


def _qwen3_vl(text: dict[str, Any], vision: dict[str, Any], tied: bool) -> dict[str, Any]:
    text = text | {"head_dim": 128, "vocab_size": 151936}
    vision = {"model_type": "qwen3_vl", "out_hidden_size": text["hidden_size"], **vision}
    return {
        "model_type": "qwen3_vl",
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": tied,
    }


def _gemma3(text: dict[str, Any]) -> dict[str, Any]:
    vision = _SIGLIP | {"image_size": 896, "num_hidden_layers": 27}
    return {"model_type": "gemma3", "text_config": text, "vision_config": vision, "mm_tokens_per_image": 256}


_QWEN3_VISION_S = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
CONFIGS: dict[str, dict[str, Any]] = {
    "llava-1.5-13b-hf": _llava(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
    ),
    "llava-1.5-7b-hf": _llava(),
    "llava-onevision-qwen2-7b-ov-hf": _onevision(_text("qwen2", (3584, 18944, 28, 28, 4), vocab_size=152064)),
    "llava-onevision-qwen2-0.5b-ov-hf": _onevision(
        _text("qwen2", (896, 4864, 24, 14, 2), vocab_size=152000, tie_word_embeddings=True)
    ),
    "SmolVLM2-500M-Video-Instruct": _smolvlm("smolvlm", _text("llama", (960, 2560, 32, 15, 5), head_dim=64)),
    "SmolVLM2-256M-Video-Instruct": _smolvlm("smolvlm", _text("llama", (576, 1536, 30, 9, 3), head_dim=64)),
    "SmolVLM-256M-Instruct": _smolvlm("idefics3", _text("llama", (576, 1536, 30, 9, 3), head_dim=64)),
    "InternVL3-8B-hf": _internvl(_text("qwen2", (3584, 18944, 28, 28, 4))),
    "InternVL3-2B-hf": _internvl(_text("qwen2", (1536, 8960, 28, 12, 2))),
    "Qwen2.5-VL-7B-Instruct": _qwen2_5_vl(_text("", (3584, 18944, 28, 28, 4), vocab_size=152064)),
    "Qwen2.5-VL-3B-Instruct": _qwen2_5_vl(
        _text("", (2048, 11008, 36, 16, 2), vocab_size=151936, tie_word_embeddings=True)
    ),
    "Qwen3-VL-8B-Instruct": _qwen3_vl(_text("qwen3_vl_text", (4096, 12288, 36, 32, 8)), {}, False),
    "Qwen3-VL-2B-Instruct": _qwen3_vl(
        _text("qwen3_vl_text", (2048, 6144, 28, 16, 8)),
        _QWEN3_VISION_S | {"deepstack_visual_indexes": [5, 11, 17]},
        True,
    ),
    "gemma-3-12b-it": _gemma3(_text("gemma3_text", (3840, 15360, 48, 16, 8))),
    "gemma-3-4b-it": _gemma3(_text("gemma3_text", (2560, 10240, 34, 8, 4))),
}
# As the hub counts them, where it was known.
PARAMETERS = {
    "llava-1.5-7b-hf": 7_063_427_072,
    "Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen3-VL-8B-Instruct": 8_767_123_696,
    "Qwen3-VL-2B-Instruct": 2_127_532_032,
    "gemma-3-4b-it": 4_300_079_472,
    "gemma-3-12b-it": 12_187_325_040,
}


def write_model_folder(out: Path, name: str) -> Path:
    """All that is read without torch; the tokenizer and the processor are stand-ins. Those of Qwen have a
    budget of pixels."""
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(copy.deepcopy(CONFIGS[name])))
    (out / "tokenizer.json").write_text("{}")
    (out / "chat_template.jinja").write_text("{{ messages }}")
    size = {"longest_edge": 512}
    if CONFIGS[name]["model_type"].startswith("qwen"):
        size = {"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096}
    (out / "processor_config.json").write_text(json.dumps({"image_processor": {"size": size}}))
    return out
