"""``python -m alignkd.cache_teacher FOLDER``: one rank of writing a cache, resumed if there is a part of it.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT come from the environment; the configuration lies in
the folder.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from alignkd.config import load_run_config
from alignkd.folder_program import run_on_folder
from alignkd.teacher_cache.check import check_teacher
from alignkd.teacher_cache.folder import SHARD_SAMPLES, CachePaths, Manifest

if TYPE_CHECKING:
    from alignkd.distributed.ranks import Ranks

log = logging.getLogger(__name__)


def main(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    return run_on_folder("alignkd.cache_teacher FOLDER", arguments, _run)


def _run(folder: Path) -> int:
    check_teacher(load_run_config(CachePaths(folder).config))  # before torch is imported, which takes seconds
    import torch.distributed as dist

    from alignkd.distributed.ranks import start_ranks

    for name, alone in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, alone)
    ranks = start_ranks(timeout=timedelta(days=2))  # the slowest rank is waited for
    manifest = write(folder, ranks)
    dist.destroy_process_group()
    if ranks.is_first:
        size = f"{manifest.bytes / 1e9:,.2f} GB"
        samples = manifest.identity.samples
        print(f"{folder}: {size}, {manifest.positions:,} positions of {samples:,} samples", flush=True)
    return 0


def write(folder: Path, ranks: Ranks, shard_samples: int = SHARD_SAMPLES) -> Manifest:
    """Write what is missing of the cache that ``folder`` describes. Collective."""
    from alignkd.engine.shared_index import shared_index
    from alignkd.models.encoding import student_encoder
    from alignkd.run_folder.progress import Progress
    from alignkd.teacher.cache_writer import write_cache

    config = load_run_config(CachePaths(folder).config)
    encoder = student_encoder(config)
    silent = Progress(folder, writes=False)
    index = shared_index(CachePaths(folder).index, config.data, encoder, ranks, silent)
    log.info("%s", index.summary())
    started = time.monotonic()

    def report(done: int, total: int) -> None:
        left = (time.monotonic() - started) / done * (total - done)
        log.info("%d of %d shards of this rank, %.1f h left", done, total, left / 3600)

    return write_cache(folder, config, index, encoder, ranks, report, shard_samples)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
