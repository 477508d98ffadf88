"""Small pairs of transformers' families with random weights, and batches for them, without files.

Depths and widths of the language models are those of ``benchmarks.models.SMALL``; a LLaVA-like image is one
run of 24 x 24 tokens, a Qwen-like one 16 x 16 behind a tower with deepstack features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from alignkd.data.batch import IGNORE_INDEX, Batch
from alignkd.data.collate import CollateSettings, ExpandedExample, collate
from alignkd.models.families.table import FAMILIES
from alignkd.models.families.transformers import TransformersModel, attention_of_parts, attention_with
from benchmarks.batches import BEFORE_IMAGE, Shape
from benchmarks.models import SMALL, VOCABULARY, Decoder

IMAGE_ID = VOCABULARY - 1
LLAVA_SIDE, QWEN_SIDE = 24, 16  # vision tokens
PATCH, QWEN_PATCH, MERGED = 14, 16, 2


class Model(NamedTuple):
    ours: TransformersModel
    plain: Any  # transformers' own class and SDPA, with the same parameters


def _text(decoder: Decoder) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": decoder.width,
        "intermediate_size": decoder.feed_forward,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.heads // 2,
        "head_dim": decoder.width // decoder.heads,
    }


def _llava(decoder: Decoder) -> tuple[Any, Any]:
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_attention_heads=2,
        num_hidden_layers=8,
        image_size=LLAVA_SIDE * PATCH,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        text_config=LlamaConfig(**_text(decoder)),
        vision_config=vision,
        image_token_index=IMAGE_ID,
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration, config


def _qwen3_vl(decoder: Decoder) -> tuple[Any, Any]:
    half = decoder.width // decoder.heads // 2
    section = [half - 2 * (half // 3), half // 3, half // 3]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}
    vision = {
        "depth": 8,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_heads": 2,
        "patch_size": QWEN_PATCH,
        "spatial_merge_size": MERGED,
        "temporal_patch_size": 2,
        "out_hidden_size": decoder.width,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [1, 3, 5],
    }
    config = Qwen3VLConfig(
        text_config={**_text(decoder), "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE_ID,
        tie_word_embeddings=False,
    )
    return Qwen3VLForConditionalGeneration, config


def _llava_image(rng: np.random.Generator) -> dict[str, torch.Tensor]:
    side = LLAVA_SIDE * PATCH
    return {"pixel_values": torch.from_numpy(rng.standard_normal((1, 3, side, side), dtype=np.float32))}


def _qwen_image(rng: np.random.Generator) -> dict[str, torch.Tensor]:
    rows = QWEN_SIDE * MERGED
    patches = rng.standard_normal((rows * rows, 3 * 2 * QWEN_PATCH**2), dtype=np.float32)
    return {"pixel_values": torch.from_numpy(patches), "image_grid_thw": torch.tensor([[1, rows, rows]])}


@dataclass(frozen=True)
class Builder:
    config_of: Callable[[Decoder], tuple[Any, Any]]  # class and configuration
    image: Callable[[np.random.Generator], dict[str, torch.Tensor]]
    vision_tokens: int


BUILDERS = {
    "llava": Builder(_llava, _llava_image, LLAVA_SIDE**2),
    "qwen3_vl": Builder(_qwen3_vl, _qwen_image, QWEN_SIDE**2),
}


def random_models(
    name: str, dtype: torch.dtype, device: torch.device, decoders: tuple[Decoder, Decoder] | None = None
) -> tuple[Model, Model]:
    """(teacher, student)."""
    sizes = decoders or (SMALL.teacher, SMALL.student)
    made = [_random_model(name, decoder, dtype, device) for decoder in sizes]
    return made[0], made[1]


def _random_model(name: str, decoder: Decoder, dtype: torch.dtype, device: torch.device) -> Model:
    row = FAMILIES[name]
    model_class, config = BUILDERS[name].config_of(decoder)
    with torch.random.fork_rng():
        torch.manual_seed(decoder.width)
        # Each gets a configuration of its own: they differ in the attention function, which is a part of it.
        wholes = [
            model_class._from_config(
                type(config).from_dict(config.to_dict()), dtype=dtype, attn_implementation=parts
            ).to(device)
            for parts in (attention_of_parts(config, row), attention_with(config, "sdpa"))
        ]
    whole, plain = wholes
    plain.load_state_dict(whole.state_dict(keep_vars=True), assign=True)
    return Model(TransformersModel(whole, row, VOCABULARY), plain)


def random_window(name: str, shape: Shape, device: torch.device) -> list[Batch]:
    """One micro-batch of samples with an image each; the second half of the text after it is supervised."""
    rng, builder = np.random.default_rng(0), BUILDERS[name]
    examples = []
    for length in shape.lengths:
        after = length - BEFORE_IMAGE - builder.vision_tokens
        ids = rng.integers(3, IMAGE_ID, size=length)
        columns = np.arange(BEFORE_IMAGE, BEFORE_IMAGE + builder.vision_tokens)
        ids[columns] = IMAGE_ID
        labels = [IGNORE_INDEX] * (length - after // 2) + ids[length - after // 2 :].tolist()
        is_text = ids != IMAGE_ID
        examples.append(ExpandedExample(ids.tolist(), labels, (columns,), is_text, builder.image(rng)))
    dummy = builder.image(rng)
    return [collate(examples, CollateSettings(0, (0, 0, 0), dummy=dummy)).to(device)]
