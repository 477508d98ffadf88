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
# Of Qwen processors: what older files call the sides of ``size``, and transformers' default.
PIXEL_KEYS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
QWEN_SIZE = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
# Settings that decide how many tokens an image becomes. ``size`` and ``crop_size`` also decide what is seen.
GRID_KEYS = (
    "size",
    "crop_size",
    "max_image_size",
    *PIXEL_KEYS,
    "patch_size",
    "merge_size",
    "image_seq_length",
    "image_seq_len",
)


def with_pixel_budget(settings: Settings) -> dict[str, Any]:
    """Settings of a Qwen processor with its budget of pixels under ``size`` alone, as transformers merges
    it."""
    size = dict(settings.get("size") or QWEN_SIZE)
    for key, side in PIXEL_KEYS.items():
        if settings.get(key) is not None:
            size[side] = settings[key]
            size.pop(key, None)
    return {key: value for key, value in settings.items() if key not in PIXEL_KEYS} | {"size": size}


def differing_grid_keys(teacher: Settings, student: Settings) -> list[str]:
    """Also those that only one of them has: the other's processor takes a default."""
    return [key for key in GRID_KEYS if teacher.get(key) != student.get(key)]


def grid_problem(family: Family, teacher: Settings, student: Settings) -> str | None:
    """Why tokens on grids of different sizes cannot be compared; None: they can."""
    if not family.one_grid:
        return f"{family.model_type} does not make one rectangular grid of an image"
    if family.one_grid_if is not None:
        key, valid = family.one_grid_if
        if teacher.get(key) not in valid or student.get(key) not in valid:
            return f"{family.model_type} cuts images into tiles; valid: {key} = {valid[0]}"
    if family.may_keep_shape and not (_has_one_shape(teacher) and _has_one_shape(student)):
        return "their images may keep their shape; valid: `size` as height and width, or `crop_size`"
    if _view(teacher) != _view(student):
        return "they do not see the same part of an image"
    return None


def _has_one_shape(settings: Settings) -> bool:
    """Whether all images are made the same height and width."""
    sides = _sides(settings)
    return {"height", "width"} <= sides.keys() or ("shortest_edge" in sides and _crop(settings) is not None)


def _view(settings: Settings) -> tuple[object, ...]:
    """How an image is fitted, and how much of what is fitted is cropped away."""
    sides, crop = _sides(settings), _crop(settings)
    if crop is None:
        return (sorted(sides),)
    crops = {"height": crop, "width": crop} if isinstance(crop, int) else dict(crop)
    kept = [Fraction(crops[side], sides.get(side) or sides["shortest_edge"]) for side in ("height", "width")]
    return (sorted(sides), kept)


def _sides(settings: Settings) -> dict[str, Any]:
    size = settings.get("size")
    return {"shortest_edge": size} if isinstance(size, int) else dict(size or {})


def _crop(settings: Settings) -> Any:
    return settings.get("crop_size") if settings.get("do_center_crop", True) else None
