"""The configuration of a model folder, read without torch (the launcher needs it on a login node).

The format is MobileVLM V2's ``config.json``: LLaMA's keys, the ``mm_*`` keys of the vision side, and the name
of a CLIP tower, whose own ``config.json`` is read by :mod:`alignkd.models.tower`. One key is ours:
``mm_vision_tokens_per_side``, the side of the projector's pooled grid, 12 in all published models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkd.errors import CheckpointError
from alignkd.models.json_file import read_json
from alignkd.models.tower import TOWER_SIZES, tower_by_name, tower_from_folder

# Keys that a plain LLaMA folder lacks and other readers of the published format expect.
VISION_DEFAULTS: dict[str, Any] = {
    "image_aspect_ratio": "pad",
    "mm_projector_type": "ldpnetv2",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tokens_per_side": 12,
    "vision_tower_type": "clip",
}
LLAMA_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
ONLY_SUPPORTED: dict[str, Any] = {
    "mm_projector_type": "ldpnetv2",
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "vision_tower_type": "clip",
    "tie_word_embeddings": False,
    "rope_scaling": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}


@dataclass(frozen=True)
class MobileVLMConfig:
    """Shapes and names of one model. ``raw`` is its whole config.json, so that saving loses nothing."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    initializer_range: float
    mm_hidden_size: int
    mm_vision_tower: str
    mm_vision_select_layer: int
    mm_vision_tokens_per_side: int
    image_aspect_ratio: str
    tower_config: dict[str, Any]
    preprocessor_config: dict[str, Any]
    raw: dict[str, Any]

    @property
    def vision_tokens(self) -> int:
        """V: vision tokens of one image after pooling."""
        return self.mm_vision_tokens_per_side**2


def read_model_config(folder: Path | str, vision_tower: Path | str | None = None) -> MobileVLMConfig:
    """Read ``folder/config.json``. ``vision_tower`` (a CLIP or MobileVLM folder) completes a plain LLaMA
    folder or replaces the tower that the file names.

    Raises CheckpointError for missing keys and for variants that are not implemented here.
    """
    folder = Path(folder)
    path = folder / "config.json"
    raw = read_json(path)
    if vision_tower is not None:
        name, tower, preprocessor = tower_from_folder(Path(vision_tower))
        raw = {**raw, "mm_vision_tower": name, "mm_hidden_size": tower["hidden_size"]}
    elif "mm_vision_tower" in raw:
        tower, preprocessor = tower_by_name(folder, str(raw["mm_vision_tower"]))
    elif raw.get("model_type", "llama") not in ("llama", "mobilevlm"):
        raise CheckpointError(
            f"{path}: `model_type` is {raw['model_type']!r}; this command knows MobileVLM V2 only "
            "(docs/models.md)"
        )
    else:
        raise CheckpointError(
            f"{path}: a plain LLaMA folder has no vision tower; name one in model.vision_tower "
            "(a CLIP folder or a MobileVLM folder)"
        )
    _refuse_variants(path, raw, tower)
    rope = raw.get("rope_parameters") or {}  # transformers 5 moved `rope_theta` there
    rope_theta = float(raw.get("rope_theta") or rope.get("rope_theta") or 10000.0)
    raw = {**VISION_DEFAULTS, **raw, "rope_theta": rope_theta}
    raw |= {"model_type": "mobilevlm", "architectures": ["MobileLlamaForCausalLM"]}
    heads = int(raw["num_attention_heads"])
    return MobileVLMConfig(
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_hidden_layers=int(raw["num_hidden_layers"]),
        num_attention_heads=heads,
        num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
        max_position_embeddings=int(raw["max_position_embeddings"]),
        rms_norm_eps=float(raw["rms_norm_eps"]),
        rope_theta=rope_theta,
        initializer_range=float(raw.get("initializer_range", 0.02)),
        mm_hidden_size=int(raw.get("mm_hidden_size", tower["hidden_size"])),
        mm_vision_tower=str(raw["mm_vision_tower"]),
        mm_vision_select_layer=int(raw["mm_vision_select_layer"]),
        mm_vision_tokens_per_side=int(raw["mm_vision_tokens_per_side"]),
        image_aspect_ratio=str(raw["image_aspect_ratio"]),
        tower_config=tower,
        preprocessor_config=preprocessor,
        raw=raw,
    )


def _refuse_variants(path: Path, raw: dict[str, Any], tower: dict[str, Any]) -> None:
    """Raises CheckpointError listing everything in ``raw`` and ``tower`` that is not implemented here."""
    problems = [f"`{key}` is missing" for key in LLAMA_KEYS if key not in raw]
    problems += [
        f"`{key}` is {raw[key]!r}; only {value!r} is supported"
        for key, value in ONLY_SUPPORTED.items()
        if key in raw and raw[key] != value
    ]
    if raw.get("model_type", "llama") not in ("llama", "mobilevlm"):
        problems.append(f"`model_type` is {raw['model_type']!r}; only 'llama' and 'mobilevlm' are supported")
    rope_type = (raw.get("rope_parameters") or {}).get("rope_type", "default")
    if rope_type != "default":
        problems.append(f"`rope_parameters.rope_type` is {rope_type!r}; only 'default' is supported")
    numbers = {f"`{key}`": raw[key] for key in LLAMA_KEYS if key in raw}
    numbers |= {f"the tower's `{key}`": tower[key] for key in TOWER_SIZES}
    wrong = {name: value for name, value in numbers.items() if not _is_positive(value)}
    problems += [f"{name} is {value!r}; it must be a positive number" for name, value in wrong.items()]
    if not problems:
        problems = _contradictions(raw, tower)
    if problems:
        raise CheckpointError(f"{path}: " + "; ".join(problems))


def _contradictions(raw: dict[str, Any], tower: dict[str, Any]) -> list[str]:
    """Numbers that contradict one another."""
    problems = []
    width, heads = raw["hidden_size"], raw["num_attention_heads"]
    groups = raw.get("num_key_value_heads") or heads
    if width % heads or heads % groups:
        problems.append(
            f"`hidden_size` {width} must be a multiple of `num_attention_heads` {heads}, and that of "
            f"`num_key_value_heads` {groups}"
        )
    if (raw.get("head_dim") or width // heads) != width // heads:
        problems.append(
            f"`head_dim` is {raw['head_dim']}; only hidden_size / num_attention_heads is supported"
        )
    if raw.get("mm_hidden_size", tower["hidden_size"]) != tower["hidden_size"]:
        problems.append(
            f"`mm_hidden_size` is {raw['mm_hidden_size']}, the tower's width is {tower['hidden_size']}"
        )
    side, patches = raw.get("mm_vision_tokens_per_side", 12), tower["image_size"] // tower["patch_size"]
    if not isinstance(side, int) or not 1 <= side <= patches:
        problems.append(
            f"`mm_vision_tokens_per_side` is {side!r}; valid: 1 to {patches} (the tower's patches per side)"
        )
    layer, layers = raw.get("mm_vision_select_layer", -2), tower["num_hidden_layers"]
    if not isinstance(layer, int) or not -layers - 1 <= layer <= layers:
        problems.append(
            f"`mm_vision_select_layer` is {layer!r}; valid: {-layers - 1} to {layers} (the tower's states)"
        )
    return problems


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
