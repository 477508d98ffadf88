"""The tensors of transformers' families, counted from their ``config.json``, and their shapes.

Names are transformers' own, but for the beginnings: ``vision_tower.``, ``projector.``, ``language_model.``
and ``head.``, as in MobileVLM's sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignkd.config.schema import DataSection
from alignkd.models.families.table import FAMILIES
from alignkd.models.processor_files import has_processor, processor_settings
from launcher.plan.family_config import FamilyConfig, read_family_config
from launcher.plan.family_towers import TOWERS, grid, is_qwen, side
from launcher.plan.image_tokens import image_tokens
from launcher.plan.shapes import ImageTokens, ModelShapes, VisionShapes
from launcher.plan.tensors import ModelSizes, linear, norm

Tensors = dict[str, int]
WITH_BIASES = ("qwen2", "qwen2_5_vl_text")  # of queries, keys and values
COUNTED_ALIKE = (
    "{}: its layers are counted like MobileVLM's; sliding windows, norms of queries and keys, separators "
    "between tiles and later layers' vision features are not counted, and memory was compared with real "
    "modules for MobileVLM only"
)
WITH_NORMS = ("qwen3", "qwen3_vl_text", "gemma3_text")  # of queries and keys


def family_sizes(
    folder: Path, family: str, data: DataSection, student: ModelSizes | None = None
) -> ModelSizes:
    """Images that become as many tokens as they are large are assumed to take half of a sample, if the
    processor makes so many of one. ``student``: whose images a teacher sees. Raises CheckpointError for what
    is not known here."""
    config = read_family_config(folder, family)
    tower = TOWERS[config.vision["model_type"]](config.vision)
    tensors = {f"vision_tower.{name}": size for name, size in tower.items()}
    tensors |= {f"projector.{name}": size for name, size in _projector(config).items()}
    if family == "llava_onevision":
        tensors["image_newline"] = config.text["hidden_size"]
    tensors |= _language_model(config)
    blocks = "vision_tower.blocks." if is_qwen(config.vision) else "vision_tower.encoder."
    settings = processor_settings(folder, FAMILIES[family]) if has_processor(folder) else None
    images = image_tokens(config, settings, data.max_image_pixels)
    if student is None or student.images is None:
        tokens = images.nearest(data.max_length // 2)
    else:
        tokens = images.beside(student.shapes.vision_tokens, student.images)
    notes = (COUNTED_ALIKE.format(family), *_image_notes(family, images, tokens, student))
    return ModelSizes(family_shapes(config, tokens), tensors, blocks, notes=notes, images=images)


def _image_notes(family: str, images: ImageTokens, tokens: int, student: ModelSizes | None) -> Iterator[str]:
    if images.is_fixed:
        return
    if student is not None and tokens != student.shapes.vision_tokens:
        yield (
            f"{family}: an image of {student.shapes.vision_tokens} vision tokens for the student has at most "
            f"{tokens} for the teacher, by the budgets of pixels of their processors"
        )
    elif tokens == images.least:
        yield (
            f"{family}: an image becomes as many tokens as it is large; {tokens} are assumed, the fewest "
            "that the processor's budget of pixels makes"
        )
    elif tokens == images.most:
        yield (
            f"{family}: an image becomes as many tokens as it is large; {tokens} are assumed, the most that "
            "the processor's budget of pixels and data.max_image_pixels allow"
        )
    else:
        yield (
            f"{family}: an image becomes as many tokens as it is large; half of data.max_length is assumed "
            f"({tokens}), with which the attention block is largest"
        )


def family_shapes(config: FamilyConfig, vision_tokens: int) -> ModelShapes:
    text, vision = config.text, config.vision
    D, heads = text["hidden_size"], text["num_attention_heads"]
    per_token = _patches_per_token(config)
    patches = vision_tokens * per_token
    qwen = is_qwen(vision)
    channels = vision["in_channels"] * vision["temporal_patch_size"] if qwen else vision["num_channels"]
    merged = vision["hidden_size"] * per_token
    return ModelShapes(
        vocab_size=text["vocab_size"],
        hidden_size=D,
        intermediate_size=text["intermediate_size"],
        num_hidden_layers=text["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=text["num_key_value_heads"] or heads,
        head_width=text["head_dim"] or D // heads,
        vision_tokens=vision_tokens,
        vision=VisionShapes(
            width=vision["hidden_size"],
            mlp=vision["intermediate_size"],
            layers=vision["depth"] if qwen else vision["num_hidden_layers"],
            patches=patches,
            seen=patches if qwen else min(grid(vision), patches) + 1,
            values=patches * channels * side(vision["patch_size"]) ** 2,
            projected=vision_tokens,
            # At most: the merged patches and their norm, two matrices' outputs and an activation.
            projector_values=vision_tokens * (2 * merged + 3 * D),
        ),
    )


def _patches_per_token(config: FamilyConfig) -> int:
    if config.family in ("idefics3", "smolvlm"):
        return int(config.whole["scale_factor"] ** 2)
    if config.family == "internvl":
        return int(1 / config.whole["downsample_ratio"]) ** 2
    if config.family == "gemma3":
        return grid(config.vision) // int(config.whole["mm_tokens_per_image"])
    return int(config.vision.get("spatial_merge_size", 1) ** 2)


def _language_model(config: FamilyConfig) -> Tensors:
    text, prefix = config.text, "language_model."
    D, F, W, kind = text["hidden_size"], text["intermediate_size"], text["vocab_size"], text["model_type"]
    heads = text["num_attention_heads"]
    width = text["head_dim"] or D // heads
    Q, K = heads * width, (text["num_key_value_heads"] or heads) * width
    tensors = {f"{prefix}embed_tokens.weight": W * D}
    norms = ["input_layernorm", "post_attention_layernorm"]
    if kind == "gemma3_text":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for layer in range(text["num_hidden_layers"]):
        own = f"{prefix}layers.{layer}."
        for name, outputs in (("q_proj", Q), ("k_proj", K), ("v_proj", K)):
            tensors |= linear(f"{own}self_attn.{name}", D, outputs, bias=kind in WITH_BIASES)
        tensors |= linear(f"{own}self_attn.o_proj", Q, D, bias=False)
        if kind in WITH_NORMS:
            tensors |= {f"{own}self_attn.{name}_norm.weight": width for name in "qk"}
        for name in ("gate_proj", "up_proj", "down_proj"):
            tensors[f"{own}mlp.{name}.weight"] = D * F
        tensors |= {f"{own}{name}.weight": D for name in norms}
    tensors[f"{prefix}norm.weight"] = D
    return tensors if config.tied else tensors | {"head.weight": W * D}


def _projector(config: FamilyConfig) -> Tensors:
    vision, D = config.vision, config.text["hidden_size"]
    width, per_token = vision["hidden_size"], _patches_per_token(config)
    if config.family == "gemma3":
        return {"mm_input_projection_weight": width * D, "mm_soft_emb_norm.weight": width}
    if config.family in ("idefics3", "smolvlm"):
        return {"modality_projection.proj.weight": width * per_token * D}
    if is_qwen(vision):
        return _mergers(vision)
    bias = config.whole.get("multimodal_projector_bias", True)
    inputs = width * per_token
    matrices = linear("linear_1", inputs, D, bias=bias) | linear("linear_2", D, D, bias=bias)
    return (norm("layer_norm", inputs) if config.family == "internvl" else {}) | matrices


def _mergers(vision: dict[str, Any]) -> Tensors:
    width, out = vision["hidden_size"], vision["out_hidden_size"]
    merged = width * vision["spatial_merge_size"] ** 2
    if vision["model_type"] == "qwen2_5_vl_vision":
        matrices = linear("merger.mlp.0", merged, merged) | linear("merger.mlp.2", merged, out)
        return {"merger.ln_q.weight": width} | matrices
    tensors = norm("merger.norm", width)
    names = [
        "merger",
        *(f"deepstack_merger_list.{n}" for n in range(len(vision["deepstack_visual_indexes"]))),
    ]
    for name in names:
        if name != "merger":
            tensors |= norm(f"{name}.norm", merged)
        tensors |= linear(f"{name}.linear_fc1", merged, merged) | linear(f"{name}.linear_fc2", merged, out)
    return tensors
