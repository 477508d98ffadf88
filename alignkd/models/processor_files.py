"""Whether two folders of transformers process texts and images alike, by their files. Without torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from alignkd.config.schema import ModelSection
from alignkd.errors import CheckpointError
from alignkd.models.families.table import Family, text_section
from alignkd.models.json_file import read_json
from alignkd.models.other_grids import differing_grid_keys, grid_problem, with_pixel_budget

TOKENIZER = "tokenizer.json"
SETTINGS = ("preprocessor_config.json", "processor_config.json")
NAMES = ("processor_class", "image_processor_type", "_processor_class")  # newer and older ones differ


def chat_problems(model: ModelSection, student: Path, family: Family) -> list[str]:
    """Why teacher and student do not see the same tokens and pixels (empty: they do, by their files).

    Keys of MobileVLM that other models do not have are refused, too.
    """
    problems = [
        f"model.{key}: only MobileVLM's student can be put together from parts; remove the key"
        for key in ("vision_tower", "student_config")
        if getattr(model, key) is not None
    ]
    teacher = student if model.teacher is None else Path(model.teacher)
    try:
        ours, theirs = _described(student), _described(teacher)
        settings, their_settings = processor_settings(student, family), processor_settings(teacher, family)
    except CheckpointError as error:
        return [*problems, str(error)]
    different = [name for name, value in ours.items() if theirs.get(name) != value]
    grid_keys = differing_grid_keys(their_settings, settings)
    for key, value in settings.items():
        if their_settings.get(key) != value and key not in grid_keys:
            different.append(f"`{key}` in their processors")
    reason = grid_problem(family, their_settings, settings) if grid_keys else None
    if reason is not None:
        keys = ", ".join(f"`{key}`" for key in grid_keys)
        different.append(f"{keys} in their processors, and {reason}")
    return problems + [f"teacher and student have different {what}" for what in different]


def has_other_grids(family: Family, teacher: Path, student: Path) -> bool:
    """Whether their processors may make different numbers of vision tokens of an image. Raises
    CheckpointError."""
    return bool(differing_grid_keys(processor_settings(teacher, family), processor_settings(student, family)))


def _described(folder: Path) -> dict[str, Any]:
    """What must be equal, by the name that an error gives it."""
    path = folder / TOKENIZER
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a model folder needs its fast tokenizer")
    return {
        f"tokenizers ({TOKENIZER})": hashlib.sha256(path.read_bytes()).hexdigest(),
        "chat templates": _chat_template(folder),
        # The losses cap the logits of both models alike.
        "`text_config.final_logit_softcapping`": text_section(read_json(folder / "config.json")).get(
            "final_logit_softcapping"
        ),
    }


def has_processor(folder: Path) -> bool:
    return any((folder / name).is_file() for name in SETTINGS)


def processor_settings(folder: Path, family: Family) -> dict[str, Any]:
    """Of the processor and its image half, by name. Raises CheckpointError when there are none."""
    settings: dict[str, Any] = {}
    if not has_processor(folder):
        raise CheckpointError(f"{folder}: has neither {' nor '.join(SETTINGS)}")
    for name in SETTINGS:
        if (folder / name).is_file():
            settings |= _flat(read_json(folder / name))
    return with_pixel_budget(settings) if family.has_pixel_budget else settings


def _chat_template(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            template = read_json(folder / name).get("chat_template")
            if template is not None:
                return str(template)
    raise CheckpointError(f"{folder}: has no chat template (chat_template.jinja)")


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """An older folder has the image processor's settings in a file of their own, a newer one in a section."""
    found = {key: value for key, value in settings.items() if key not in NAMES}
    section = found.pop("image_processor", {})
    return found | {key: value for key, value in section.items() if key not in NAMES}
