"""An index in a file that is mapped into memory, not read: one copy for all processes of a node.

First line: sha256 of all that follows, so a torn or damaged file is known. Second line: JSON with the facts
and the place of each array. Then the arrays.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignkd.data.index import ARRAYS, Index, SourceReport
from alignkd.run_folder.atomic_files import replacing

_ALIGNMENT = 64
_HASH_LINE = 65  # 64 digits and a newline


@dataclass(frozen=True)
class FileState:
    """A data file as it was when it was hashed. Whoever changes it changes these (its ctime at least)."""

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
    """Replaces ``path`` at once; raises OSError."""
    index = stored.index
    arrays: list[Any] = [np.ascontiguousarray(getattr(index, name), dtype="<i8") for name in ARRAYS]
    facts = {
        "rows": len(index),
        "weights": index.weights,
        "reports": [asdict(report) for report in index.reports],
        "max_length": index.max_length,
        "fingerprint": index.fingerprint,
        "files": [asdict(state) for state in stored.files],
    }
    line = json.dumps(facts).encode()
    line += b" " * (-(_HASH_LINE + len(line) + 1) % _ALIGNMENT) + b"\n"
    digest = hashlib.sha256(line)
    for array in arrays:
        digest.update(array)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(digest.hexdigest().encode() + b"\n" + line)
        for array in arrays:
            file.write(array)


def read_index(path: Path) -> StoredIndex | None:
    """None when there is no such file, or it is damaged. The arrays are views of the mapped file."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        view = memoryview(mapped)
        if hashlib.sha256(view[_HASH_LINE:]).hexdigest().encode() + b"\n" != view[:_HASH_LINE]:
            return None
        mapped.seek(_HASH_LINE)
        facts = json.loads(mapped.readline())
        rows, start = int(facts["rows"]), mapped.tell()
        arrays: dict[str, Any] = {
            name: np.frombuffer(mapped, dtype="<i8", count=rows, offset=start + 8 * rows * number)
            for number, name in enumerate(ARRAYS)
        }
        index = Index(
            **arrays,
            weights=tuple(facts["weights"]),
            reports=tuple(SourceReport(**report) for report in facts["reports"]),
            max_length=facts["max_length"],
            fingerprint=facts["fingerprint"],
        )
        return StoredIndex(index, tuple(FileState(**state) for state in facts["files"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
