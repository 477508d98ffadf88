"""Files that must survive a power failure, and disks that are full only when one asks them."""

from __future__ import annotations

import os
from pathlib import Path


def flush_to_disk(path: Path) -> None:
    """fsync of a file or of a folder's entries. Raises OSError: a network file system may say only here that
    it has no room."""
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


def replace_text(path: Path, text: str) -> None:
    """``path`` holds ``text`` afterwards, also after a power failure, or what it held before. Raises
    OSError."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    flush_to_disk(temporary)
    temporary.replace(path)
    flush_to_disk(path.parent)
