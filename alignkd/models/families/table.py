"""The families of transformers that can be distilled, and what differs between them. Without torch.

A family is transformers' ``model_type``. What a row does not say is the same in all of them: vision tokens
stand where ``input_ids`` have the configuration's image token, ``get_image_features`` returns them in the
order of their places, text is causal and padded on the right.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkd.errors import CheckpointError
from alignkd.models.json_file import read_json

SOFTMAX = ("full_attention", "sliding_attention")  # among ``layer_types``
PACKED_TEXT = ("llama", "mistral", "qwen2", "qwen3")  # language models whose samples only attention mixes
MISTRALS_WINDOW = 4096  # transformers' default, where the file has no such key
MOBILEVLM = ("mobilevlm", "llama")  # ``llama``: a plain one, which model.vision_tower completes


@dataclass(frozen=True)
class Family:
    model_type: str
    tower: tuple[str, ...]  # modules below the whole model that are frozen unless the tower is trained
    projector: tuple[str, ...]  # modules with a learning rate of their own; they may lie in the tower
    inputs_by_row: bool = False  # the tower's inputs have a first dimension for the batch's rows
    marks_images: str | None = None  # argument of the model that is 1 at vision tokens and 0 elsewhere
    position_inputs: tuple[str, ...] = ()  # of the tower's, those that the positions of tokens follow from
    # Attention is not causal everywhere: the vision tokens of an image see one another.
    has_masks: bool = False
    unused: tuple[str, ...] = ()  # modules for sound, which are never trained; a model may lack them
    has_softcap: bool = False  # of the logits, where text_config.final_logit_softcapping says so
    # Samples may be packed: all that tells them apart are the positions and the attention. See
    # ``packing_problem``.
    packs: bool = False
    # An image is one rectangular grid of tokens that shows the whole of it, or the same part, whatever the
    # number of tokens: then a teacher and a student may differ in it. If ``one_grid_if`` is given, only with
    # one of these values of a setting of the processor.
    one_grid: bool = False
    one_grid_if: tuple[str, tuple[object, ...]] | None = None
    # Some models have a processor that keeps the shape of an image, whose tokens are then no square.
    may_keep_shape: bool = False
    # ``min_pixels`` and ``max_pixels`` of the processor override its ``size``.
    has_pixel_budget: bool = False
    tried: bool = True  # else the row is not in the table: see ``untried``


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llava",
            ("model.vision_tower",),
            ("model.multi_modal_projector",),
            packs=True,
            one_grid=True,
            may_keep_shape=True,
        ),
        *(
            Family(
                name,
                ("model.vision_model",),
                ("model.connector",),
                inputs_by_row=True,
                packs=True,
                one_grid=True,
                one_grid_if=("do_image_splitting", (False,)),
            )
            for name in ("idefics3", "smolvlm")
        ),
        Family(
            "internvl",
            ("model.vision_tower",),
            ("model.multi_modal_projector",),
            packs=True,
            one_grid=True,
            one_grid_if=("max_patches", (1,)),
        ),
        Family("llava_onevision", ("model.vision_tower",), ("model.multi_modal_projector",), packs=True),
        *(
            Family(
                name,
                ("model.visual",),
                projector,
                marks_images="mm_token_type_ids",
                position_inputs=("image_grid_thw",),
                one_grid=True,
                has_pixel_budget=True,
            )
            for name, projector in (
                ("qwen2_5_vl", ("model.visual.merger",)),
                ("qwen3_vl", ("model.visual.merger", "model.visual.deepstack_merger_list")),
                ("qwen3_5", ("model.visual.merger",)),
            )
        ),
        Family(
            "gemma3",
            ("model.vision_tower",),
            ("model.multi_modal_projector",),
            marks_images="token_type_ids",
            has_masks=True,
            one_grid=True,
            one_grid_if=("do_pan_and_scan", (False, None)),
        ),
        Family(
            "gemma4",
            ("model.vision_tower",),
            ("model.embed_vision",),
            marks_images="mm_token_type_ids",
            has_masks=True,
            unused=("model.audio_tower", "model.embed_audio"),
            has_softcap=True,
        ),
    )
}
REFUSED = {  # seen to be wrong, not only untried
    "paligemma": "its processor marks the answer as a prefix, so every token of it sees those that follow",
    "lfm2_vl": "transformers has its image processor for torchvision only, and images go through Pillow here",
    "fast_vlm": "its vision tower is timm's, which needs torchvision and has not been tried",
}
REFUSED_TEXT = {  # the same of language models
    "gpt_oss": "attention sinks are not part of the attention block that the loss compares",
}


def family_of(folder: Path) -> Family | None:
    """The family of a model folder; None is MobileVLM. One that is not in the table is returned with its name
    only, if its config.json has what such models have. Raises CheckpointError for all others."""
    path = folder / "config.json"
    raw = read_json(path)
    name = raw.get("model_type", "llama")
    if name in MOBILEVLM or "mm_vision_tower" in raw:
        return None
    if name in REFUSED:
        raise CheckpointError(f"{path}: `model_type` {name} is refused: {REFUSED[name]}")
    missing = [] if name in FAMILIES else _missing(raw)
    if missing:
        supported = ", ".join([*MOBILEVLM[:1], *FAMILIES])
        raise CheckpointError(
            f"{path}: `model_type` {name!r} is not supported; supported: {supported}; others are admitted "
            f"untried if their config.json has what these have; missing: {', '.join(missing)}"
        )
    _check_text(path, text_section(raw))
    if raw.get("auto_map"):
        raise CheckpointError(
            f"{path}: `auto_map` names code of its own, which is never run; use a folder of transformers' "
            f"own {name}"
        )
    return FAMILIES.get(name, Family(name, (), (), tried=False))


def packing_problem(folder: Path, family: Family) -> str | None:
    """Why the samples of a model cannot share a row; None: they can. Raises CheckpointError."""
    if not family.packs:
        return f"samples of {family.model_type} are padded"
    text = text_section(read_json(folder / "config.json"))
    name = text.get("model_type", "llama")
    if name not in PACKED_TEXT:
        return f"samples of a {name} are padded"
    window = text.get("sliding_window", MISTRALS_WINDOW if name == "mistral" else None)
    if window is not None and text.get("use_sliding_window", True):
        return "samples of a language model with sliding windows are padded"
    if text.get("attention_dropout"):  # the variable-length kernel has none
        return "samples of a language model with attention dropout are padded"
    return None


def text_section(raw: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a config.json, which is the whole file in some older ones."""
    section = raw.get("text_config")
    return section if isinstance(section, dict) else raw


def _missing(raw: dict[str, Any]) -> list[str]:
    found = {
        "text_config": "hidden_size" in text_section(raw) or "text_config" in raw,
        "vision_config": isinstance(raw.get("vision_config"), dict),
        "image_token_id": raw.get("image_token_id", raw.get("image_token_index")) is not None,
    }
    return [key for key, is_there in found.items() if not is_there]


def _check_text(path: Path, text: dict[str, Any]) -> None:
    """Raises CheckpointError for a language model whose first layer is not what the loss compares."""
    name = text.get("model_type")
    if name in REFUSED_TEXT:
        raise CheckpointError(f"{path}: `text_config.model_type` {name} is refused: {REFUSED_TEXT[name]}")
    if text.get("attn_logit_softcapping") is not None:
        raise CheckpointError(f"{path}: `text_config.attn_logit_softcapping` is not supported; valid: null")
    types = text.get("layer_types") or list(SOFTMAX)
    if not set(types) & set(SOFTMAX):
        raise CheckpointError(
            f"{path}: `text_config.layer_types` has no layer with an attention map to compare; found: "
            f"{', '.join(sorted(set(types)))}; at least one must be {' or '.join(SOFTMAX)}"
        )


def family_name(folder: Path) -> str:
    family = family_of(folder)
    return MOBILEVLM[0] if family is None else family.model_type
