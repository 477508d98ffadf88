"""Caches of the fixture's teacher, and runs that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignkd.cache_teacher import write
from alignkd.config import Config, dump_config, load_config
from alignkd.distributed.ranks import Ranks
from alignkd.run_folder.paths import RunPaths
from alignkd.teacher_cache.folder import CachePaths
from tests import tiny

SHARD_SAMPLES = 2  # of the 32 that a run folder of the fixture has


def begin(run: Path, folder: Path) -> Path:
    """The folder of a cache for this run, as `alignkd cache` leaves it to the ranks."""
    CachePaths(folder).folder.mkdir(parents=True)
    CachePaths(folder).config.write_text(RunPaths(run).config.read_text())
    return folder


def write_on(ranks: Ranks, folder: str) -> None:
    """Collective."""
    write(Path(folder), ranks, SHARD_SAMPLES)


def cached_run(run: Path, cache: Path, world_size: int, **changes: Any) -> Path:
    """A run folder as :func:`tiny.write_run` writes it, whose teacher is cached."""
    return tiny.write_run(run, world_size, teacher__placement="cached", teacher__cache=str(cache), **changes)


def config_of(folder: Path) -> Config:
    return load_config(CachePaths(folder).config)


def change_config(folder: Path, **changes: Any) -> None:
    """``changes``: sections with the keys that differ."""
    config = config_of(folder)
    updates = {name: getattr(config, name).model_copy(update=keys) for name, keys in changes.items()}
    CachePaths(folder).config.write_text(dump_config(config.model_copy(update=updates)))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that is read of a cache."""
    files = [*sorted(CachePaths(folder).shards.iterdir()), CachePaths(folder).manifest]
    return {file.name: file.read_bytes() for file in files}
