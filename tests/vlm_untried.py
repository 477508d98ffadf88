"""The same for families that are not in the table."""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)

from tests.vlm_models import (
    TEMPLATE,
    Builder,
    _image_id,
    _qwen_ids,
    _qwen_processor,
    _qwen_text,
    _text,
    _vision,
)

PINPOINTS = [[28, 28], [28, 56], [56, 28]]


def _llava_next(tokenizer: Any, wide: bool) -> Any:
    """Tiles and newline tokens."""
    config = LlavaNextConfig(
        text_config=LlamaConfig(**_text(tokenizer, wide)),
        vision_config=CLIPVisionConfig(**_vision(num_hidden_layers=3, image_size=28, patch_size=14)),
        image_token_index=_image_id(tokenizer),
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=False,
    )
    return LlavaNextForConditionalGeneration(config)


def _llava_next_processor(tokenizer: Any) -> Any:
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=PINPOINTS
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def _qwen2_vl(tokenizer: Any, wide: bool) -> Any:
    """Positions in three dimensions; the projector is part of the tower."""
    text = _qwen_text(tokenizer, wide)
    vision = {"depth": 2, "embed_dim": 24, "num_heads": 2, "mlp_ratio": 2, "patch_size": 7}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config={**vision, "hidden_size": text["hidden_size"]},
        tie_word_embeddings=False,
        **_qwen_ids(tokenizer),
    )
    return Qwen2VLForConditionalGeneration(config)


UNTRIED: dict[str, tuple[Builder, Any]] = {
    "llava_next": (_llava_next, _llava_next_processor),
    "qwen2_vl": (_qwen2_vl, _qwen_processor(Qwen2VLProcessor)),
}
