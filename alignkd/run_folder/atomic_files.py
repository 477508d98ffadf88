"""Files that are replaced whole: a reader, also one after a crash, sees the old content or the new one.

Disks that are full, and network file systems above all, may say so only when a file is flushed. That is why
everything that must not be lost is flushed before it gets its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp"  # how the names of unfinished files end; they begin with a dot


def flush_to_disk(path: Path) -> None:
    """fsync of a file, or of the entries of a folder. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """All files below ``folder``, then the folders, itself last."""
    paths = sorted(folder.rglob("*"), reverse=True)
    for path in [path for path in paths if path.is_file()] + [path for path in paths if path.is_dir()]:
        flush_to_disk(path)
    flush_to_disk(folder)


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Gives a temporary file's path, for the caller to write; afterwards the file is renamed to ``path``.

    When the block or the file system fails, the temporary file is removed and ``path`` is what it was. With
    ``durable`` the new content also survives a power failure from here on. Raises OSError.
    """
    # Unlike a process id, the name is the only one among all hosts of a shared file system.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY}")
    try:
        yield temporary
        if durable:
            flush_to_disk(temporary)
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # a failing disk may fail here again, and hide why it failed first
            temporary.unlink(missing_ok=True)
    if durable:
        flush_to_disk(path.parent)


def write_text_atomic(path: Path, text: str, *, mode: int | None = None, durable: bool = True) -> None:
    """Replace ``path`` with a UTF-8 file of ``text`` that has the permissions ``mode`` (None: by the umask).
    Raises OSError."""
    with replacing(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")
        if mode is not None:
            temporary.chmod(mode)


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Replace ``path`` with ``content``, durably. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` with ``value``, durably. Raises OSError."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in ``path``; None when there is no such file, or something else than one JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
