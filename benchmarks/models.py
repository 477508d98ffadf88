"""Model pairs with random weights: small ones for the CPU, the published shapes for a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.initialization import no_init_weights

from alignkd.models.configuration import MobileVLMConfig
from alignkd.models.families.mobilevlm import MobileVLM
from alignkd.models.tower import CLIP_MEAN, CLIP_STD, PUBLISHED_TOWER_CONFIG, TOWER_DEFAULTS

VOCABULARY = 32000


@dataclass(frozen=True)
class Decoder:
    width: int
    feed_forward: int
    layers: int
    heads: int


@dataclass(frozen=True)
class Pair:
    name: str
    teacher: Decoder
    student: Decoder
    tower: dict[str, Any]


# Depths near the published ones, since they decide what one layer's block costs relative to all layers.
SMALL = Pair(
    "small",
    teacher=Decoder(384, 1024, 16, 6),
    student=Decoder(256, 704, 12, 4),
    tower={
        **TOWER_DEFAULTS,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_attention_heads": 2,
        "num_hidden_layers": 8,
        "image_size": 336,
        "patch_size": 14,
    },
)
PUBLISHED = Pair(
    "published",
    teacher=Decoder(4096, 11008, 32, 32),
    student=Decoder(2048, 5632, 24, 16),
    tower=PUBLISHED_TOWER_CONFIG,
)
# Every width a quarter of the published: the teacher's part of a step is near theirs.
QUARTER = Pair(
    "quarter",
    teacher=Decoder(1024, 2752, 32, 8),
    student=Decoder(512, 1408, 24, 4),
    tower={
        **PUBLISHED_TOWER_CONFIG,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
    },
)
PAIRS = {pair.name: pair for pair in (SMALL, QUARTER, PUBLISHED)}


def model_config(decoder: Decoder, tower: dict[str, Any]) -> MobileVLMConfig:
    return MobileVLMConfig(
        vocab_size=VOCABULARY,
        hidden_size=decoder.width,
        intermediate_size=decoder.feed_forward,
        num_hidden_layers=decoder.layers,
        num_attention_heads=decoder.heads,
        num_key_value_heads=decoder.heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        initializer_range=0.02,
        mm_hidden_size=tower["hidden_size"],
        mm_vision_tower="random",
        mm_vision_select_layer=-2,
        mm_vision_tokens_per_side=12,
        image_aspect_ratio="pad",
        tower_config=tower,
        preprocessor_config={"image_mean": CLIP_MEAN, "image_std": CLIP_STD},
        raw={},
    )


def random_model(config: MobileVLMConfig, dtype: torch.dtype, device: torch.device, seed: int) -> MobileVLM:
    """Built without a copy on the host, so that 7B parameters need a GPU's memory only."""
    with torch.device("meta"), no_init_weights():
        model = MobileVLM(config).to(dtype)
    model = model.to_empty(device=device)
    model.restore_buffers(device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
        else:
            parameter.data.normal_(0.0, 0.02, generator=generator)
    return model


def random_pair(pair: Pair, dtype: torch.dtype, device: torch.device) -> tuple[MobileVLM, MobileVLM]:
    """(teacher, student) with the same vision tower, like the published pair."""
    teacher = random_model(model_config(pair.teacher, pair.tower), dtype, device, seed=1)
    student = random_model(model_config(pair.student, pair.tower), dtype, device, seed=2)
    student.vision_tower.load_state_dict(teacher.vision_tower.state_dict())
    return teacher, student
