"""The file format of an index. It is mapped into memory, so that all processes of a node share one copy.

The first line is the sha256 of everything after it, which reveals torn and damaged files. The second line is
JSON with the metadata. The arrays follow.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from alignkd.data.index import ARRAYS, Index, SourceReport
from alignkd.errors import FileSystemError
from alignkd.run_folder.atomic_files import replacing

_ALIGNMENT = 64
_HASH_LINE = 65  # 64 digits and a newline


@dataclass(frozen=True)
class FileState:
    """A data file when it was hashed. Any change to it changes at least its ctime."""

    sha256: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


@dataclass(frozen=True)
class StoredIndex:
    index: Index
    files: tuple[FileState, ...]  # per source


def write_index(path: Path, stored: StoredIndex) -> None:
    """Replace ``path`` atomically; raises OSError."""
    index = stored.index
    arrays: list[Any] = [np.ascontiguousarray(getattr(index, name), dtype="<i8") for name in ARRAYS]
    metadata = {
        "rows": len(index),
        "weights": index.weights,
        "reports": [asdict(report) for report in index.reports],
        "max_length": index.max_length,
        "fingerprint": index.fingerprint,
        "files": [asdict(state) for state in stored.files],
    }
    line = json.dumps(metadata).encode()
    line += b" " * (-(_HASH_LINE + len(line) + 1) % _ALIGNMENT) + b"\n"
    digest = hashlib.sha256(line)
    for array in arrays:
        digest.update(array)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(digest.hexdigest().encode() + b"\n" + line)
        for array in arrays:
            file.write(array)


def read_index(path: Path) -> StoredIndex | None:
    """The index in ``path``, with views of the mapped file as arrays; None if it is missing or damaged."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        view = memoryview(mapped)
        if hashlib.sha256(view[_HASH_LINE:]).hexdigest().encode() + b"\n" != view[:_HASH_LINE]:
            return None
        mapped.seek(_HASH_LINE)
        metadata = json.loads(mapped.readline())
        rows, start = int(metadata["rows"]), mapped.tell()
        arrays: dict[str, Any] = {
            name: np.frombuffer(mapped, dtype="<i8", count=rows, offset=start + 8 * rows * number)
            for number, name in enumerate(ARRAYS)
        }
        index = Index(
            **arrays,
            weights=tuple(metadata["weights"]),
            reports=tuple(SourceReport(**report) for report in metadata["reports"]),
            max_length=metadata["max_length"],
            fingerprint=metadata["fingerprint"],
            map_again=partial(_same_index, path, metadata["fingerprint"]),
        )
        return StoredIndex(index, tuple(FileState(**state) for state in metadata["files"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _same_index(path: Path, fingerprint: str) -> Index:
    stored = read_index(path)
    if stored is None or stored.index.fingerprint != fingerprint:
        raise FileSystemError(f"{path}: the index is not what it was when this rank read it")
    return stored.index
