"""What a cache of the teacher takes, how fast it is read, and what it saves."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignkd.config import Config
from alignkd.errors import UserError
from alignkd.teacher_cache.folder import CachePaths, read_manifest
from launcher.plan.advice import with_placement
from launcher.plan.plan import GIB, Plan
from launcher.plan.roofline import Chip, roofline
from launcher.plan.sharding import answer_bytes

COMPARED = "zero3"
SCALE_BYTES = 4  # of a row in fp8


@dataclass(frozen=True)
class CacheSize:
    samples: int
    positions: int
    is_exact: bool  # counted when the cache was written; otherwise all text, an upper bound

    def bytes(self, plan: Plan) -> int:
        assert plan.sizes.teacher is not None
        return self.positions * position_bytes(plan.config, plan.sizes.teacher.shapes.hidden_size)


def position_bytes(config: Config, width: int) -> int:
    """What ``alignkd.teacher.cache_forms`` stores for a position of a teacher of this width."""
    if config.teacher.cache_form == "fp8":
        return width + SCALE_BYTES
    return answer_bytes(config, width)


def cache_size(config: Config, vision_tokens: int) -> CacheSize:
    """From the manifest of a finished cache, otherwise from the token index, which is built if need be.
    ``vision_tokens``: of an image for the student, at least. Raises UserError when the data cannot be
    read."""
    folder = Path(str(config.teacher.cache))
    if CachePaths(folder).manifest.exists():
        manifest = read_manifest(folder)
        return CacheSize(manifest.identity.samples, manifest.positions, is_exact=True)
    from alignkd.data.index_cache import cached_index  # these import torch, which takes seconds
    from alignkd.models.encoding import student_encoder

    with tempfile.TemporaryDirectory() as scratch:
        index = cached_index(Path(scratch) / "index", config.data, student_encoder(config))
        text = int((index.length - vision_tokens * index.image_count).sum())
    return CacheSize(len(index), text, is_exact=False)


@dataclass(frozen=True)
class CacheFigures:
    """Bytes and seconds, not rounded. With ``is_exact`` false, what depends on the size is an upper bound."""

    samples: int
    positions: int
    is_exact: bool
    form: str  # teacher.cache_form
    bytes: int
    step_bytes: float  # read by all ranks together in an optimizer step
    read_rate: float  # bytes per second, of all ranks, in steps without any waiting
    compared: str  # teacher.placement that the rest is against
    saved_flops: float  # per rank and optimizer step
    saved_share: float  # of the other's FLOP
    saved_memory: int  # bytes per GPU
    saved_received: float  # bytes to each GPU per optimizer step


def cache_figures(plan: Plan, chip: Chip) -> CacheFigures | None:
    """None for a run without a cached teacher. Raises UserError when the data cannot be read."""
    if plan.config.teacher.placement != "cached" or plan.sizes.teacher is None:
        return None
    size = cache_size(plan.config, plan.sizes.student.least_vision_tokens)
    step_bytes = size.bytes(plan) / size.samples * plan.config.training.global_batch_size
    other = with_placement(plan, COMPARED)
    less = other.compute.flops - plan.compute.flops
    return CacheFigures(
        size.samples,
        size.positions,
        size.is_exact,
        plan.config.teacher.cache_form,
        size.bytes(plan),
        step_bytes,
        step_bytes / roofline(plan.config, plan.held, plan.work, plan.compute, chip).seconds,
        COMPARED,
        less,
        less / other.compute.flops,
        other.needed - plan.needed,
        other.received - plan.received,
    )


def cache_as_dict(plan: Plan, chip: Chip) -> dict[str, Any] | None:
    """``{"problem": ...}`` when the data cannot be read."""
    try:
        found = cache_figures(plan, chip)
    except UserError as error:
        return {"problem": str(error)}
    return None if found is None else asdict(found)


def cache_lines(plan: Plan, chip: Chip) -> Iterator[str]:
    """For a run with a cached teacher; nothing for others."""
    try:
        found = cache_figures(plan, chip)
    except UserError as error:
        yield f"The size of the teacher's cache is unknown: {error}"
        return
    if found is None:
        return
    most = "" if found.is_exact else "at most "
    why = "" if found.is_exact else "; the bound counts all tokens but the fewest that an image can have"
    form = "" if found.form == "exact" else f", {found.form}"
    yield (
        f"Cache of the teacher{form}: {most}{found.bytes / 1e9:,.2f} GB for {found.samples:,} samples "
        f"({most}{found.bytes / found.samples / 1e6:,.2f} MB each{why})."
    )
    yield (
        f"Read per optimizer step: {most}{found.step_bytes / 1e9:,.3f} GB by all ranks; in steps without any "
        f"waiting {found.read_rate / 1e9:,.3f} GB/s."
    )
    yield (
        f"It saves, against {found.compared}: {found.saved_flops / 1e12:,.1f} TFLOP per rank and step "
        f"({found.saved_share:.0%}), {found.saved_memory / GIB:,.2f} GiB per GPU, "
        f"and {found.saved_received / 1e9:,.2f} GB to each GPU per step."
    )
