"""One builder per family: a tiny model from its configuration, and its processor with Pillow's images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessorPil,
    Gemma4Processor,
    Gemma4TextConfig,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLImageProcessorPil,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)

from alignkd.models.families.processors import images_only

IMAGE = "<image>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = (
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    IMAGE,
    "<video>",
    "<|video|>",
    "<|endoftext|>",  # the tokenizers of some families add it if it is missing
    "<img>",
    "</img>",
    "<fake_token_around_image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)),
)
LAYOUT_TOKENS = {name for name in SPECIAL if name.startswith(("<fake", "<global", "<row", "<img", "</img"))}
NAMED = {
    "image_token": IMAGE,
    "video_token": "<video>",
    "context_image_token": IMAGE,
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "boi_token": "<img>",
    "eoi_token": "</img>",
    "boa_token": "<img>",
    "eoa_token": "</img>",
}
TEXTS = ("what colour is this picture", "the answer is red", "blue green yellow and many more words")


def new_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=345, initial_alphabet=alphabet, special_tokens=list(SPECIAL))
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        extra_special_tokens=NAMED,
    )


def _text(tokenizer: Any, wide: bool) -> dict[str, Any]:
    """The teacher has more heads, key heads and width."""
    return {
        "vocab_size": len(tokenizer) + (13 if wide else 5),  # padded, and differently
        "hidden_size": 48 if wide else 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6 if wide else 4,
        "num_key_value_heads": 3 if wide else 2,
        "head_dim": 8,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": 2,
    }


def _vision(**changes: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {**sizes, **changes}


def _image_id(tokenizer: Any) -> int:
    return int(tokenizer.convert_tokens_to_ids(IMAGE))


def _llava(tokenizer: Any, wide: bool) -> Any:
    vision = CLIPVisionConfig(**_vision(num_hidden_layers=3, image_size=28, patch_size=14))
    config = LlavaConfig(
        text_config=LlamaConfig(**_text(tokenizer, wide)),
        vision_config=vision,
        image_token_index=_image_id(tokenizer),
    )
    return LlavaForConditionalGeneration(config)


def _llava_processor(tokenizer: Any) -> Any:
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def _tiles(config: Any, tokenizer: Any, wide: bool) -> Any:
    return config(
        text_config=LlamaConfig(**_text(tokenizer, wide)),
        vision_config=_vision(image_size=28, patch_size=7),
        scale_factor=2,
        image_token_id=_image_id(tokenizer),
        tie_word_embeddings=False,
    )


def _idefics3(tokenizer: Any, wide: bool) -> Any:
    return Idefics3ForConditionalGeneration(_tiles(Idefics3Config, tokenizer, wide))


def _idefics3_processor(tokenizer: Any) -> Any:
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 28}, do_image_splitting=True
    )
    return Idefics3Processor(
        image_processor=images, tokenizer=tokenizer, image_seq_len=4, chat_template=TEMPLATE
    )


def _smolvlm(tokenizer: Any, wide: bool) -> Any:
    return SmolVLMForConditionalGeneration(_tiles(SmolVLMConfig, tokenizer, wide))


def _smolvlm_processor(tokenizer: Any) -> Any:
    images = SmolVLMImageProcessorPil(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 28}, do_image_splitting=True
    )
    return images_only(SmolVLMProcessor)(images, tokenizer, None, image_seq_len=4, chat_template=TEMPLATE)


def _internvl(tokenizer: Any, wide: bool) -> Any:
    config = InternVLConfig(
        text_config=Qwen2Config(**_text(tokenizer, wide)),
        vision_config=_vision(image_size=(28, 28), patch_size=(7, 7)),
        image_token_id=_image_id(tokenizer),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(config)


def _internvl_processor(tokenizer: Any) -> Any:
    images = GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    return images_only(InternVLProcessor)(images, tokenizer, None, image_seq_length=4, chat_template=TEMPLATE)


def _llava_onevision(tokenizer: Any, wide: bool) -> Any:
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**_text(tokenizer, wide)),
        vision_config=SiglipVisionConfig(**_vision(image_size=28, patch_size=14, vision_use_head=False)),
        image_token_index=_image_id(tokenizer),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[28, 28], [28, 56], [56, 28]],
        tie_word_embeddings=False,
    )
    return LlavaOnevisionForConditionalGeneration(config)


def _llava_onevision_processor(tokenizer: Any) -> Any:
    images = LlavaOnevisionImageProcessorPil(
        size={"height": 28, "width": 28}, image_grid_pinpoints=[[28, 28], [28, 56], [56, 28]]
    )
    return images_only(LlavaOnevisionProcessor)(
        images,
        tokenizer,
        None,
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )


def _gemma3(tokenizer: Any, wide: bool) -> Any:
    text = Gemma3TextConfig(
        **_text(tokenizer, wide),
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=8,
    )
    config = Gemma3Config(
        text_config=text,
        vision_config=SiglipVisionConfig(**_vision(image_size=28, patch_size=7, vision_use_head=False)),
        mm_tokens_per_image=4,
        image_token_index=_image_id(tokenizer),
        boi_token_index=tokenizer.convert_tokens_to_ids("<img>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("</img>"),
    )
    model = Gemma3ForConditionalGeneration(config)
    projection = model.model.multi_modal_projector.mm_input_projection_weight
    torch.nn.init.normal_(projection, std=0.3)  # it begins at zero
    return model


def _gemma3_processor(tokenizer: Any) -> Any:
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    template = TEMPLATE.replace(IMAGE, "<img>")
    return Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)


def _gemma4(tokenizer: Any, wide: bool) -> Any:
    """The teacher is like the large published ones, the student like the small ones: embeddings of each
    layer, layers that share keys and values, clipped matrices, a tower for sound."""
    small = {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "num_hidden_layers": 4}
    large = {
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 2,
        "use_bidirectional_attention": "vision",
    }
    text = {**_text(tokenizer, wide), **(large if wide else small)}
    text |= {"sliding_window": 16, "global_head_dim": 16, "final_logit_softcapping": 2.0}
    text["layer_types"] = ["sliding_attention", "full_attention"] * (text["num_hidden_layers"] // 2)
    text["vocab_size_per_layer_input"] = text["vocab_size"]
    vision = _vision(patch_size=4, pooling_kernel_size=2, head_dim=12, num_key_value_heads=2)
    sound = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 16}
    config = Gemma4Config(
        text_config=Gemma4TextConfig(**text),
        vision_config={**vision, "position_embedding_size": 640, "use_clipped_linears": not wide},
        audio_config=None if wide else {**sound, "subsampling_conv_channels": [8, 4]},
        image_token_id=_image_id(tokenizer),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        audio_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        boi_token_id=tokenizer.convert_tokens_to_ids("<img>"),
        eoi_token_id=tokenizer.convert_tokens_to_ids("</img>"),
    )
    model = Gemma4ForConditionalGeneration(config)
    for layer in model.model.language_model.layers:
        layer.layer_scalar.fill_(0.7)
    return model


def _gemma4_processor(tokenizer: Any) -> Any:
    images = Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70, pooling_kernel_size=2)
    return images_only(Gemma4Processor)(None, images, tokenizer, None, chat_template=TEMPLATE)


def _qwen_text(tokenizer: Any, wide: bool) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    return {**_text(tokenizer, wide), "rope_parameters": rope}


def _qwen_vision(text: dict[str, Any]) -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 7,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": text["hidden_size"],
    }


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    return {
        "image_token_id": _image_id(tokenizer),
        "video_token_id": tokenizer.convert_tokens_to_ids("<video>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<img>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("</img>"),
    }


def _qwen2_5_vl(tokenizer: Any, wide: bool) -> Any:
    text = _qwen_text(tokenizer, wide)
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**_qwen_vision(text), "window_size": 28, "fullatt_block_indexes": [1]},
        tie_word_embeddings=False,
        **_qwen_ids(tokenizer),
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl(tokenizer: Any, wide: bool) -> Any:
    text = _qwen_text(tokenizer, wide)
    # Two would reach the last layer, whose vision tokens no loss looks at.
    deep = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    config = Qwen3VLConfig(
        text_config=text,
        vision_config={**_qwen_vision(text), **deep},
        tie_word_embeddings=False,
        **_qwen_ids(tokenizer),
    )
    return Qwen3VLForConditionalGeneration(config)


def _qwen3_5(tokenizer: Any, wide: bool) -> Any:
    """The first layer has a linear attention."""
    text = _qwen_text(tokenizer, wide)
    text["head_dim"] = 16
    text["initializer_range"] = 0.1  # at 0.3 the linear attention would magnify every rounding error
    text["rope_parameters"]["partial_rotary_factor"] = 0.5
    linear = {f"linear_num_{name}_heads": 2 for name in ("key", "value")}
    linear |= {f"linear_{name}_head_dim": 8 for name in ("key", "value")}
    config = Qwen3_5Config(
        text_config={**text, **linear, "layer_types": ["linear_attention", "full_attention"]},
        vision_config={**_qwen_vision(text), "num_position_embeddings": 64},
        tie_word_embeddings=False,
        **_qwen_ids(tokenizer),
    )
    return Qwen3_5ForConditionalGeneration(config)


def _qwen_processor(processor: Any) -> Callable[[Any], Any]:
    def build(tokenizer: Any) -> Any:
        images = Qwen2VLImageProcessorPil(
            patch_size=7,
            merge_size=2,
            temporal_patch_size=2,
            size={"shortest_edge": 14 * 14, "longest_edge": 42 * 42},
        )
        return images_only(processor)(images, tokenizer, None, chat_template=TEMPLATE)

    return build


Builder = Callable[[Any, bool], Any]  # of a tokenizer, as wide as a teacher?
BUILDERS: dict[str, tuple[Builder, Callable[[Any], Any]]] = {
    "llava": (_llava, _llava_processor),
    "idefics3": (_idefics3, _idefics3_processor),
    "smolvlm": (_smolvlm, _smolvlm_processor),
    "internvl": (_internvl, _internvl_processor),
    "llava_onevision": (_llava_onevision, _llava_onevision_processor),
    "qwen2_5_vl": (_qwen2_5_vl, _qwen_processor(Qwen2_5_VLProcessor)),
    "qwen3_vl": (_qwen3_vl, _qwen_processor(Qwen3VLProcessor)),
    "qwen3_5": (_qwen3_5, _qwen_processor(Qwen3VLProcessor)),
    "gemma3": (_gemma3, _gemma3_processor),
    "gemma4": (_gemma4, _gemma4_processor),
}
