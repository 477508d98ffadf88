"""Vision tokens of one image, by a family's ``config.json`` and the settings of its processor."""

from __future__ import annotations

from alignkd.models.families.table import FAMILIES
from alignkd.models.other_grids import QWEN_SIZE, Settings
from launcher.plan.family_config import FamilyConfig
from launcher.plan.family_towers import grid, side
from launcher.plan.shapes import ImageTokens

# Of a processor that makes one grid of a fixed number of tokens: its setting, with transformers' default.
FIXED = {
    "idefics3": ("image_seq_len", 169),
    "smolvlm": ("image_seq_len", 169),
    "internvl": ("image_seq_length", 256),
}


def image_tokens(config: FamilyConfig, settings: Settings | None, max_image_pixels: int) -> ImageTokens:
    """``settings``: of the processor, with its budget of pixels under ``size``; None without its files."""
    family = FAMILIES[config.family]
    fixed = _tokens_of_tower(config)
    if fixed is None and settings is not None and config.family in FIXED:
        key, default = FIXED[config.family]
        fixed = int(settings.get(key, default)) if _is_whole(config.family, settings) else None
    if fixed is not None:
        return ImageTokens(fixed, fixed)
    if not family.has_pixel_budget:
        return ImageTokens(1, None)
    pixels = (side(config.vision["patch_size"]) * int(config.vision["spatial_merge_size"])) ** 2
    if settings is None:
        return ImageTokens(1, None, pixels)
    budget = {**QWEN_SIZE, **settings["size"]}
    least = max(-(-budget["shortest_edge"] // pixels), 1)
    largest = min(budget["longest_edge"], max_image_pixels)
    return ImageTokens(least, max(largest // pixels, least), pixels)


def _tokens_of_tower(config: FamilyConfig) -> int | None:
    """Where every image has the tower's size."""
    if config.family == "gemma3":
        return int(config.whole["mm_tokens_per_image"])
    if config.family == "llava":
        return grid(config.vision) + int(config.whole["vision_feature_select_strategy"] == "full")
    return None


def _is_whole(family: str, settings: Settings) -> bool:
    """Whether the processor cuts no image into tiles."""
    condition = FAMILIES[family].one_grid_if
    return condition is not None and settings.get(condition[0]) in condition[1]
