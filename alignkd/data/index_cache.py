"""Caches the index in the run folder and, for other runs on the same data, in the user's cache folder, so
that lengths are computed only once."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from alignkd import __version__
from alignkd.config.schema import DataSection
from alignkd.data.encoder import SampleEncoder
from alignkd.data.index import Index, Progress, build_index, data_fingerprint
from alignkd.data.index_file import FileState, StoredIndex, read_index, write_index
from alignkd.data.json_list import JsonListFile

CACHE_VARIABLE = "ALIGNKD_CACHE"
KEPT = 8  # most recently used indices in the user's cache
_SETTLED_NS = 2_000_000_000  # two changes within the clock's granularity leave the same time stamps


def cache_folder() -> Path:
    """``$ALIGNKD_CACHE``, or ``alignkd`` in the user's cache folder."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignkd"


def cached_index(
    path: Path,
    data: DataSection,
    encoder: SampleEncoder,
    progress: Progress | None = None,
) -> Index:
    """The index in ``path`` if it belongs to these data and settings, otherwise one from the user's cache,
    otherwise a new one, which is written to both. A damaged file is ignored, and so is a failure to write.

    Data files are compared by content: each is hashed, unless it is the file that was hashed for ``path`` and
    has not changed since.
    """
    own = read_index(path)
    states = _file_states(data, own)
    hashes = [state.sha256 for state in states]
    fingerprint = data_fingerprint(data, encoder, hashes)
    if own is not None and own.index.fingerprint == fingerprint:
        if own.files != states:
            _write(path, StoredIndex(own.index, states))
        return own.index
    # Per release: another one may check and measure entries differently. A run keeps the index it has.
    shared = cache_folder() / "index" / f"{fingerprint}-{__version__}.index"
    found = read_index(shared)
    if found is not None and found.index.fingerprint == fingerprint:
        index = found.index
        with suppress(OSError):
            os.utime(shared)
    else:
        index = build_index(data, encoder, progress, hashes)
        with suppress(OSError):
            shared.parent.mkdir(parents=True, exist_ok=True)
        _write(shared, StoredIndex(index, states))
        _remove_old(shared.parent)
    return _write(path, StoredIndex(index, states))


def _file_states(data: DataSection, own: StoredIndex | None) -> tuple[FileState, ...]:
    known = {(s.size, s.mtime_ns, s.ctime_ns, s.inode): s for s in (own.files if own is not None else ())}
    states = []
    for source in data.sources:
        file = JsonListFile(source.file)
        before = file.stat()
        key = (before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_ino)
        if key not in known:
            sha256 = file.sha256()
            # A time stamp that is too recent is not reliable: the hash is used for this start only.
            settled = time.time_ns() - before.st_ctime_ns > _SETTLED_NS
            known[key] = FileState(sha256, *(key if settled else (-1, -1, -1, -1)))
        states.append(known[key])
    return tuple(states)


def _write(path: Path, stored: StoredIndex) -> Index:
    """The index mapped from the file; the one in memory if it could not be written."""
    try:
        write_index(path, stored)
    except OSError:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return stored.index
    written = read_index(path)
    return stored.index if written is None else written.index


def _remove_old(folder: Path) -> None:
    with suppress(OSError):
        by_use = sorted(folder.glob("*.index"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in by_use[KEPT:]:
            path.unlink()
