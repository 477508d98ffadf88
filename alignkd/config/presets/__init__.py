"""Example configurations: commented YAML files beside this module, some of which serve several models."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import NamedTuple

from alignkd.config.dotted import did_you_mean
from alignkd.errors import UserError


class Pair(NamedTuple):
    """Names of two folders on a hub, and what to know of them."""

    teacher: str
    student: str
    note: str


TEMPLATES = (
    "Answers must end with a special token in the chat template of both folders; a run refuses others."
)
PAIRS = {
    "qwen3-vl-8b-to-2b": Pair(
        "Qwen3-VL-8B-Instruct",
        "Qwen3-VL-2B-Instruct",
        "An image becomes as many tokens as it is large: image_options of a source bounds its size.",
    ),
    "smolvlm2-500m-to-256m": Pair(
        "SmolVLM2-500M-Video-Instruct",
        "SmolVLM2-256M-Video-Instruct",
        "Images are cut into tiles: image_options of a source, {size: {longest_edge: 1024}}, bounds them.",
    ),
    "llava-1.5-13b-to-7b": Pair("llava-1.5-13b-hf", "llava-1.5-7b-hf", TEMPLATES),
    "internvl3-8b-to-2b": Pair(
        "InternVL3-8B-hf",
        "InternVL3-2B-hf",
        "Images are cut into tiles: image_options of a source, {max_patches: 4}, bounds them.",
    ),
    "gemma-3-12b-to-4b": Pair("gemma-3-12b-it", "gemma-3-4b-it", "Every image becomes 256 tokens."),
}
OF_3B = {
    "MobileVLM V2 1.7B in both": "MobileVLM V2 3B in both",
    "with the paper's hyper-parameters": "with those the paper has for 1.7B",
    "MobileLLaMA-1.4B-Chat": "MobileLLaMA-2.7B-Chat",
    "short-": "short-3b-",
}
PRESETS = {
    "sample": "the small task of `alignkd sample-data`: a teacher trained from scratch, then its student",
    "short": "the paper's two stages, samples of at most 512 tokens",
    "long": "the paper's two stages, samples of at most 2048 tokens",
    "short-3b": "`short` with the 3B student",
    **{name: f"{pair.teacher} teaches {pair.student}" for name, pair in PAIRS.items()},
}


def preset_text(name: str) -> str:
    """The YAML text of a preset. Raises UserError naming the valid ones."""
    if name not in PRESETS:
        known = "".join(f"\n- {key}: {text}" for key, text in PRESETS.items())
        raise UserError(f"--preset {name}: no such preset{did_you_mean(name, PRESETS)}\nvalid:{known}")
    if name in PAIRS:
        pair = PAIRS[name]
        changes = {"TEACHER": pair.teacher, "STUDENT": pair.student, "NOTE": pair.note, "NAME": name}
        return _changed("pair", changes)
    return _changed("short", OF_3B) if name == "short-3b" else _changed(name, {})


def _changed(file: str, changes: dict[str, str]) -> str:
    text = (resources.files(__name__) / f"{file}.yaml").read_text(encoding="utf-8")
    for old, new in changes.items():
        assert old in text, f"{file}.yaml has {old}"
        text = text.replace(old, new)
    return text


def write_preset(name: str, out: Path, force: bool = False) -> None:
    """Write a preset to ``out``; an existing file is kept unless ``force``."""
    text = preset_text(name)
    try:
        with out.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(
            f"{out} already exists; choose another file (--out) or replace it (--force)"
        ) from None
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from error
