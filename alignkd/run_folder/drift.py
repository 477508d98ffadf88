"""Drift: what has changed between the configuration in a checkpoint and the run's."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from alignkd.config.dotted import flatten
from alignkd.config.migrate import RENAMED, migrate
from alignkd.errors import UserError, raise_if_passing
from alignkd.run_folder.paths import RunPaths

# These do not affect what is learnt or in what order. Data and teacher are compared by hash; the student's
# paths say where it started, and a resume takes its weights from the checkpoint.
MAY_CHANGE = (
    "run.",
    "slurm.",
    "checkpoint.",
    "evaluation.",
    "logging.",
    "tracking.",
    "data.workers",
    "model.",
    "teacher.placement",  # but the form of a cache counts only where one is read
    "teacher.cache",
    "teacher.lookahead",
    "teacher.keep_head",
    "distillation.share_vision_tower",
    "training.packing",
    "training.checkpoint_every_nth_layer",
    "training.compile_layers",
    "training.deterministic",
    "training.tokens_per_micro_batch",
    "training.max_skipped_steps",
    "training.hang_seconds",
    "training.rendezvous_seconds",
)
STAGE = "student.zero_stage"
PLACEMENT, FORM, TOP_K = "teacher.placement", "teacher.cache_form", "teacher.cache_top_k"
IMAGES = "data.images"  # no key of the configuration: accepts images of other sizes
PATHS = ("file", "image_folder")
ANY: Any = object()
# What runs did whose checkpoints do not have these keys.
ADDED: dict[str, Any] = {
    "distillation.balance": "fixed",
    "distillation.balance_every": 100,
    FORM: "exact",
    TOP_K: 64,
}
NEWER = ("image_options",)  # older checkpoints do not have these keys of a source, which says what empty says


def allowed_changes(run: Path) -> dict[str, Any]:
    """Keys that the user has accepted (``alignkd resume --allow-change``), each with the value that the run
    had then: another change of the same key is another decision. :data:`ANY` where an earlier version did not
    record it. Raises UserError for a damaged file."""
    path = RunPaths(run).allowed_changes
    if not path.exists():
        return {}
    try:
        accepted = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise_if_passing(error, path)
        accepted = None
    if isinstance(accepted, list) and all(isinstance(key, str) for key in accepted):
        accepted = dict.fromkeys(accepted, ANY)
    if not isinstance(accepted, dict):
        raise UserError(
            f"{path}: holds no keys with their values; remove it, and accept the keys again with "
            f"`alignkd resume {run} --allow-change KEY`"
        )
    values: dict[str, Any] = accepted
    return {RENAMED.get(key, key): value for key, value in values.items()}


def with_accepted(
    accepted: Mapping[str, Any], keys: Collection[str], config: Mapping[str, Any]
) -> dict[str, Any]:
    """``accepted`` and ``keys``, these and any :data:`ANY` with the values of the run's ``config``."""
    now = _comparable(config)
    known = {key: now.get(key) if value is ANY else value for key, value in accepted.items()}
    return known | {key: now.get(key) for key in keys}


def accepts_images(allowed: Mapping[str, Any], saved_sizes: str) -> bool:
    """Whether images may differ from those of a checkpoint that has this hash of their sizes. :data:`IMAGES`
    holds the hashes of all checkpoints that the run had when the user accepted it."""
    accepted = allowed.get(IMAGES)
    return accepted is ANY or (isinstance(accepted, list) and saved_sizes in accepted)


def config_drift(
    saved: Mapping[str, Any], current: Mapping[str, Any], allowed: Mapping[str, Any]
) -> list[str]:
    """One line for every key whose value differs, unless the key is harmless or ``allowed`` has it with its
    current value."""
    before, after = _comparable(saved), _comparable(current)
    return [
        f"{key}: the checkpoint has {before.get(key)!r}, the run has {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not _may_change(key)
        and not (key in allowed and (allowed[key] is ANY or allowed[key] == after.get(key)))
        and not (key == STAGE and {before.get(key), after.get(key)} == {1, 2})
        and not (key == TOP_K and None in (before.get(key), after.get(key)))  # the form differs
    ]


def _may_change(key: str) -> bool:
    section = key.split(".")[0]
    return key in MAY_CHANGE or f"{section}." in MAY_CHANGE


def must_convert(manifest: Mapping[str, Any], world_size: int, zero_stage: int) -> bool:
    """Whether these ranks can load the checkpoint only in the universal format."""
    return bool(manifest["world_size"] != world_size or saved_stage(manifest) != zero_stage)


def conversion_problem(manifest: Mapping[str, Any], world_size: int, zero_stage: int) -> str | None:
    """Why a checkpoint that must be converted cannot be converted; None when it can, or need not be."""
    stage = saved_stage(manifest)
    if not must_convert(manifest, world_size, zero_stage):
        return None
    if stage != zero_stage and {stage, zero_stage} != {1, 2}:
        return (
            f"{STAGE}: the checkpoint has {stage}, the run has {zero_stage}; DeepSpeed converts "
            f"between 1 and 2 only. Restore {stage}, or start a new run from an exported student"
        )
    if stage == 0:
        return (
            f"the checkpoint was written by {manifest['world_size']} ranks at {STAGE} 0, and this run has "
            f"{world_size}; DeepSpeed converts stages 1, 2 and 3 only. Resume on the same number of ranks"
        )
    return None


def saved_stage(manifest: Mapping[str, Any]) -> int:
    """The student's ZeRO stage when the checkpoint was saved."""
    return int(manifest["config"]["student"]["zero_stage"])


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the data's paths: files may move, and their contents are part of the data's fingerprint.

    The form of the cache is "exact" where none is read, and the number of cached tokens is absent unless they
    are: such settings have no effect."""
    flat = ADDED | flatten(migrate(config))
    if flat.get(PLACEMENT) != "cached" or not flat.get("distillation.enabled", True):
        flat[FORM] = "exact"
    if flat[FORM] != "top_k":
        del flat[TOP_K]
    flat["data.sources"] = [
        {key: value for key, value in source.items() if key not in PATHS and not (key in NEWER and not value)}
        for source in flat["data.sources"]
    ]
    return flat
