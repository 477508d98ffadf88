"""Teacher and student with different numbers of vision tokens per image: by their files, whether both see the
same part of an image on one rectangular grid each. Without torch.

Settings are those of a processor's image half, by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from alignkd.models.families.table import Family

Settings = Mapping[str, Any]
# Settings that decide how many tokens an image becomes. ``size`` and ``crop_size`` also decide what is seen.
GRID_KEYS = (
    "size",
    "crop_size",
    "max_image_size",
    "min_pixels",
    "max_pixels",
    "patch_size",
    "merge_size",
    "image_seq_length",
    "image_seq_len",
)


def differing_grid_keys(teacher: Settings, student: Settings) -> list[str]:
    """Those of the student's files; an older folder may leave out what a newer one writes."""
    return [key for key in GRID_KEYS if key in student and teacher.get(key) != student[key]]


def grid_problem(family: Family, teacher: Settings, student: Settings) -> str | None:
    """Why tokens on grids of different sizes cannot be compared; None: they can."""
    if not family.one_grid:
        return f"{family.model_type} does not make one rectangular grid of an image"
    if family.one_grid_if is not None:
        key, valid = family.one_grid_if
        if teacher.get(key) not in valid or student.get(key) not in valid:
            return f"{family.model_type} cuts images into tiles; valid: {key} = {valid[0]}"
    if _view(teacher) != _view(student):
        return "they do not see the same part of an image"
    return None


def _view(settings: Settings) -> tuple[object, ...]:
    """How an image is fitted, and how much of what is fitted is cropped away."""
    size = settings.get("size")
    sides = {"shortest_edge": size} if isinstance(size, int) else dict(size or {})
    crop = settings.get("crop_size")
    if crop is None or not settings.get("do_center_crop", True):
        return (sorted(sides),)
    crops = {"height": crop, "width": crop} if isinstance(crop, int) else dict(crop)
    kept = [Fraction(crops[side], sides.get(side) or sides["shortest_edge"]) for side in ("height", "width")]
    return (sorted(sides), kept)
