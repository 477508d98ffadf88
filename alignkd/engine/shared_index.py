"""One index for all ranks: rank 0 builds it or finds it in the cache, the others map the same file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from alignkd.config.schema import DataSection
from alignkd.data.encoder import SampleEncoder
from alignkd.data.index import Index
from alignkd.data.index_cache import cached_index
from alignkd.data.index_file import read_index
from alignkd.distributed.ranks import Ranks
from alignkd.run_folder.progress import Progress


def shared_index(
    path: Path,
    data: DataSection,
    encoder: SampleEncoder,
    ranks: Ranks,
    progress: Progress,
) -> Index:
    """The index of ``data``, mapped from ``path`` if all ranks see rank 0's file, otherwise sent to each of
    them. Collective."""

    def report(done: int, total: int) -> None:
        progress.report("indexing", done=done, total=total)

    built: list[Index] = []
    ranks.run_on_rank0(lambda: built.append(cached_index(path, data, encoder, report)))
    index = built[0] if built else None
    fingerprint = ranks.broadcast_object(None if index is None else index.fingerprint)
    if index is None:
        stored = read_index(path)
        if stored is not None and stored.index.fingerprint == fingerprint:
            index = stored.index
    if ranks.sum_on_host([int(index is None)]) > [0]:
        # With its arrays: not every rank sees the file.
        index = ranks.broadcast_object(None if index is None else replace(index, map_again=None))
    assert index is not None
    return index
