"""What a cache of the teacher takes, how fast it is read, and what it saves."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from alignkd.config import Config
from alignkd.errors import UserError
from alignkd.teacher_cache.folder import CachePaths, read_manifest
from launcher.plan.advice import with_placement
from launcher.plan.plan import GIB, Plan
from launcher.plan.roofline import Chip, roofline
from launcher.plan.sharding import teacher_size

COMPARED = "zero3"


@dataclass(frozen=True)
class CacheSize:
    samples: int
    positions: int
    is_exact: bool  # counted when the cache was written; otherwise all text, an upper bound

    def bytes(self, plan: Plan) -> int:
        assert plan.sizes.teacher is not None
        return self.positions * plan.sizes.teacher.shapes.hidden_size * teacher_size(plan.config)


def cache_size(config: Config, vision_tokens: int) -> CacheSize:
    """From the manifest of a finished cache, otherwise from the token index, which is built if need be.
    Raises UserError when the data cannot be read."""
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


def cache_lines(plan: Plan, chip: Chip) -> Iterator[str]:
    """For a run with a cached teacher; nothing for others."""
    if plan.config.teacher.placement != "cached" or plan.sizes.teacher is None:
        return
    try:
        size = cache_size(plan.config, plan.sizes.teacher.shapes.vision_tokens)
    except UserError as error:
        yield f"The size of the teacher's cache is unknown: {error}"
        return
    most = "" if size.is_exact else "at most "
    whole, of_sample = size.bytes(plan), size.bytes(plan) / size.samples
    why = "" if size.is_exact else "; the bound counts all text"
    yield (
        f"Cache of the teacher: {most}{whole / 1e9:,.2f} GB for {size.samples:,} samples "
        f"({most}{of_sample / 1e6:,.2f} MB each{why})."
    )
    seconds = roofline(plan.config, plan.held, plan.work, plan.compute, chip).seconds
    of_step = of_sample * plan.config.training.global_batch_size
    yield (
        f"Read per optimizer step: {most}{of_step / 1e9:,.3f} GB by all ranks; in steps without any waiting "
        f"{of_step / seconds / 1e9:,.3f} GB/s."
    )
    other = with_placement(plan, COMPARED)
    less = (other.compute.flops - plan.compute.flops) / 1e12
    yield (
        f"It saves, against {COMPARED}: {less:,.1f} TFLOP per rank and step "
        f"({less * 1e12 / other.compute.flops:.0%}), {(other.needed - plan.needed) / GIB:,.2f} GiB per GPU, "
        f"and {(other.received - plan.received) / 1e9:,.2f} GB to each GPU per step."
    )
