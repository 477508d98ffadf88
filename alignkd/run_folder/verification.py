"""Are the files of a checkpoint what was written? Sizes and sha256, against its manifest.

This finds accidents, not attackers: whoever can write into a run folder can write a manifest that fits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from alignkd.run_folder.checkpoints import MANIFEST, MARKER, marker_text, read_manifest

Share = tuple[int, int]  # rank, number of ranks
ALL: Share = (0, 1)


def verify(folder: Path, *, needed: Collection[str] = (), share: Share = ALL) -> list[str]:
    """Why the checkpoint in ``folder`` cannot be used; empty when it can.

    ``needed`` are keys that its manifest must have. Of the files, this rank's ``share`` is read and hashed.
    All ranks see files that the manifest does not know: they are always wrong, since DeepSpeed would unpickle
    them. Raises OSError when the file system fails, which says nothing about the checkpoint.
    """
    try:
        manifest = read_manifest(folder)
        files: dict[str, Any] = manifest["files"]
        problems = [f"{MANIFEST} lacks the key {name}" for name in needed if name not in manifest]
        if not _is_marker_of(folder):
            problems.append(f"{MARKER} belongs to another {MANIFEST}")
        return problems + differences(folder, files, share_of(sorted(files), share))
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} cannot be read ({error})"]


def _is_marker_of(folder: Path) -> bool:
    """Also true without a marker, and for an empty one, as earlier versions wrote it."""
    try:
        text = (folder / MARKER).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return True
    return text in ("", marker_text(folder))


def problems_of(folder: Path, *, needed: Collection[str] = ()) -> list[str]:
    """:func:`verify` for commands: a file system that fails is one more problem, and does not end them."""
    try:
        return verify(folder, needed=needed)
    except OSError as error:
        return [f"cannot be read ({error})"]


def data_files(folder: Path) -> list[str]:
    """Relative names of all files that a manifest covers, sorted."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (MANIFEST, MARKER)
    )


def share_of(names: list[str], share: Share) -> list[str]:
    """The part of the files that one rank hashes: together, the ranks hash each file once."""
    rank, world_size = share
    return names[rank::world_size]


def describe(folder: Path, name: str) -> dict[str, Any]:
    """Size and sha256 of one file, as the manifest has them."""
    with (folder / name).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {"bytes": (folder / name).stat().st_size, "sha256": digest.hexdigest()}


def differences(folder: Path, files: dict[str, Any], names: Collection[str]) -> list[str]:
    """How ``folder`` differs from ``files``, a manifest's. Of those, only ``names`` are read; a file that is
    not in the manifest is always found."""
    found = [problem for name in names if (problem := _difference(folder, name, files[name]))]
    return found + [f"{name} is not in the manifest" for name in data_files(folder) if name not in files]


def _difference(folder: Path, name: str, expected: dict[str, Any]) -> str | None:
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
    if describe(folder, name)["sha256"] != expected["sha256"]:
        return f"{name} has another sha256 than when it was written"
    return None
