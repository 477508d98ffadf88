"""Are the files of a checkpoint what was written? Sizes and sha256, against its manifest.

This finds accidents, not attackers: whoever can write into a run folder can write a manifest that fits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from alignkd.run_folder.checkpoints import MANIFEST, MARKER, PARTIAL, marker_text, read_manifest
from alignkd.run_folder.patience import Patience

NO_PATIENCE = Patience(0.0)


def verify(folder: Path, *, needed: Collection[str] = ()) -> list[str]:
    """Why the checkpoint in ``folder`` cannot be used; empty when it can. Every file is read.

    ``needed`` are keys that its manifest must have. Raises OSError when the file system fails, which says
    nothing about the checkpoint.
    """
    problems, files = verify_sizes(folder, needed=needed)
    complete = [name for name in sorted(files) if _size(folder / name) == files[name]["bytes"]]
    return problems + hash_differences(folder, files, complete)


def verify_sizes(
    folder: Path, *, needed: Collection[str] = (), patience: Patience = NO_PATIENCE
) -> tuple[list[str], dict[str, Any]]:
    """The part of :func:`verify` that reads no file but the manifest: names and sizes. Also gives the files
    of the manifest, with what :func:`hash_differences` compares them to.

    A file that is missing is waited for with ``patience``. One that the manifest does not know is a problem
    too, since DeepSpeed would unpickle it.
    """
    try:
        patience.until_exists(folder / MANIFEST)
        manifest = read_manifest(folder)
        files: dict[str, Any] = manifest["files"]
        problems = [f"{MANIFEST} lacks the key {name}" for name in needed if name not in manifest]
        if not _is_marker_of(folder):
            problems.append(f"{MARKER} belongs to another {MANIFEST}")
        return problems + size_differences(folder, files, patience), files
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} cannot be read ({error})"], {}


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
        if path.is_file() and path.name not in (MANIFEST, MARKER) and not _is_unfinished_marker(path)
    )


def _is_unfinished_marker(path: Path) -> bool:
    """What a kill leaves that comes between writing the marker and giving it its name."""
    return path.name.startswith(f".{MARKER}.") and path.suffix == PARTIAL


def share_of(names: Collection[str], rank: int, world_size: int) -> list[str]:
    """The part of the files that one rank hashes: together, the ranks hash each file once."""
    return sorted(names)[rank::world_size]


def describe(folder: Path, name: str) -> dict[str, Any]:
    """Size and sha256 of one file, as the manifest has them."""
    with (folder / name).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {"bytes": (folder / name).stat().st_size, "sha256": digest.hexdigest()}


def size_differences(folder: Path, files: dict[str, Any], patience: Patience = NO_PATIENCE) -> list[str]:
    """How names and sizes in ``folder`` differ from ``files``, a manifest's."""
    found = {name: (folder / name).stat().st_size for name in data_files(folder)}
    problems = []
    for name in sorted(files):
        if name not in found and patience.until_exists(folder / name) and (folder / name).is_file():
            found[name] = (folder / name).stat().st_size
        if name not in found:
            problems.append(f"{name} is missing")
        elif found[name] != files[name]["bytes"]:
            problems.append(f"{name} has {found[name]} bytes instead of {files[name]['bytes']}")
    return problems + [f"{name} is not in the manifest" for name in found if name not in files]


def hash_differences(
    folder: Path, files: dict[str, Any], names: Collection[str], patience: Patience = NO_PATIENCE
) -> list[str]:
    """Which of ``names``, files of a manifest that some host sees, are not what was written. Raises OSError,
    also for one that this host does not see, after it was waited for with ``patience``."""
    return [
        f"{name} has another sha256 than when it was written"
        for name in names
        if _sha256(folder, name, patience) != files[name].get("sha256")
    ]


def _sha256(folder: Path, name: str, patience: Patience) -> Any:
    try:
        return describe(folder, name)["sha256"]
    except FileNotFoundError:
        if not patience.until_exists(folder / name):
            raise
        return describe(folder, name)["sha256"]


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
