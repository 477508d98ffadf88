"""``alignkd cache CONFIG``: write a cache of the teacher on this machine, or check one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rich.console import Console

from alignkd.config import Config
from alignkd.errors import EXIT_FAILED, ConfigError, UserError
from alignkd.teacher_cache.check import cache_folder, check_teacher
from alignkd.teacher_cache.folder import (
    CachePaths,
    Manifest,
    hash_problem,
    read_identity,
    read_manifest,
    size_problems,
)
from alignkd.teacher_cache.key import cache_key, differences
from alignkd.text import counted
from launcher.backends.devices import device_of
from launcher.commands.cache_request import request
from launcher.commands.local_ranks import rank_variables, run_ranks
from launcher.commands.preflight import data_problems, model_problems
from launcher.run.console import say


def cache_command(folder: Path) -> list[str]:
    """One rank of writing a cache; it reads the configuration in ``folder``, and its rank from the
    environment."""
    return [sys.executable, "-m", "alignkd.cache_teacher", str(folder)]


def checked_folder(config: Config) -> Path:
    """The absolute folder of the cache to write. Raises UserError for whatever can be known to be wrong, and
    when the folder holds the cache of something else."""
    folder = Path(os.path.abspath(cache_folder(config)))
    check_teacher(config)
    problems = data_problems(config) + model_problems(config)
    if problems:
        raise ConfigError("cache of the teacher", problems)
    identity = read_identity(folder)
    if identity is not None:
        problems = differences(identity.key, cache_key(config, identity.images))
        if problems:
            raise UserError(
                "\n  ".join([f"{folder}: holds the cache of something else; what differs:", *problems])
                + "\nGive another folder (teacher.cache), or remove this one."
            )
    return folder


def write_here(folder: Path, config: Config, ranks: int) -> int:
    """Write the cache, or what is missing of it, and return the exit code. Raises UserError while another
    start writes it."""
    environments = rank_variables(ranks, "cpu" if device_of(config) == "cpu" else "auto", "--cpu")
    with request(folder, config):
        failed = run_ranks(cache_command(folder), environments, CachePaths(folder).logs)
    return 0 if failed is None else failed.code


def finished_manifest(folder: Path) -> Manifest | None:
    """None while something is missing."""
    if not CachePaths(folder).manifest.exists():
        return None
    manifest = read_manifest(folder)
    return None if size_problems(folder, manifest) else manifest


def verify(config: Config, console: Console) -> int:
    """Read the whole cache, name what is not as it was written, and return the exit code."""
    folder = cache_folder(config)
    manifest = read_manifest(folder)
    problems = size_problems(folder, manifest)
    if not problems:
        found = (hash_problem(folder, number, shard) for number, shard in enumerate(manifest.shards))
        problems = [problem for problem in found if problem is not None]
    for problem in problems:
        say(console, problem)
    if problems:
        say(console, "remove these files, and `alignkd cache` writes them again")
        return EXIT_FAILED
    say(
        console,
        f"{folder}: {counted(len(manifest.shards), 'shard')} as they were written; {describe(manifest)}",
    )
    return 0


def describe(manifest: Manifest) -> str:
    samples = manifest.identity.samples
    return f"{manifest.bytes / 1e9:,.2f} GB, {manifest.positions:,} positions of {samples:,} samples"
