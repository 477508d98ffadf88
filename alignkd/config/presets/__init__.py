"""Example configurations: commented YAML files beside this module."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from alignkd.errors import UserError

PRESETS = {
    "sample": "the small task of `alignkd sample-data`: a teacher trained from scratch, then its student",
    "short": "the paper's two stages, samples of at most 512 tokens",
    "long": "the paper's two stages, samples of at most 2048 tokens",
}


def preset_text(name: str) -> str:
    """The YAML text of a preset. Raises UserError naming the valid ones."""
    if name not in PRESETS:
        known = "; ".join(f"{key} ({text})" for key, text in PRESETS.items())
        raise UserError(f"--preset {name}: no such preset; valid: {known}")
    return (resources.files(__name__) / f"{name}.yaml").read_text(encoding="utf-8")


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
