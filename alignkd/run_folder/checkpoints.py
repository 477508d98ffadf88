"""Names in a run folder's ``checkpoints``, and what makes a checkpoint count.

A checkpoint is written as ``step-N.ATTEMPT.tmp``, described by ``manifest.json`` (every file with its size
and sha256), renamed to ``step-N``, and marked ``COMMITTED`` last. Only a marked folder whose files fit its
manifest is used. ``step-N.universal`` is the same state in a form that any number of ranks can load; it is
made from ``step-N`` in the same way, and counts in the same way.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from pathlib import Path
from typing import Any

from alignkd.run_folder.paths import RunPaths

MANIFEST = "manifest.json"
MARKER = "COMMITTED"
UNIVERSAL = ".universal"
SET_ASIDE = ".set-aside"  # newer than the step that a user went back to
_STEP = re.compile(r"step-(\d+)")


def step_name(step: int) -> str:
    return f"step-{step}"


def universal_name(step: int) -> str:
    return step_name(step) + UNIVERSAL


def new_attempt() -> str:
    """A name for what one process, or one group of ranks, is writing. Another one that is still there (on a
    node that was given up, say) never writes into the same folder."""
    return uuid.uuid4().hex[:12]


def partial_name(name: str, attempt: str) -> str:
    """Of the folder in which ``name`` is written; leftovers are found by its end."""
    return f"{name}.{attempt}.tmp"


def committed_steps(run: Path) -> list[int]:
    """Steps that carry the marker, newest first (their files are not looked at)."""
    found = step_folders(RunPaths(run).checkpoints)
    return [int(path.name.removeprefix("step-")) for path in found if (path / MARKER).is_file()]


def step_folders(parent: Path) -> list[Path]:
    """All ``step-N`` in ``parent``, marked or not, newest first."""
    found = {
        int(match[1]): path
        for path in (parent.iterdir() if parent.is_dir() else ())
        if (match := _STEP.fullmatch(path.name))
    }
    return [found[step] for step in sorted(found, reverse=True)]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Of the checkpoint in ``folder``. Raises ValueError for one of another step: that folder was renamed,
    and its state would be trained on as if it were this step's."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if _STEP.fullmatch(folder.name) and step_name(manifest["step"]) != folder.name:
        raise ValueError(f"it describes step {manifest['step']}")
    return manifest


def data_files(folder: Path) -> list[str]:
    """Relative names of all files that a manifest covers, sorted."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (MANIFEST, MARKER)
    )


def share_of(names: list[str], rank: int, world_size: int) -> list[str]:
    """The part of the files that one rank hashes."""
    return names[rank::world_size]


def describe(folder: Path, name: str) -> dict[str, Any]:
    """Size and sha256 of one file."""
    digest = hashlib.sha256()
    with (folder / name).open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"bytes": (folder / name).stat().st_size, "sha256": digest.hexdigest()}


def differences(folder: Path, files: dict[str, Any], names: list[str]) -> list[str]:
    """Why the files are not what the manifest (``files``) describes; empty when they are.

    ``names`` are the ones whose contents are hashed here. A file that the manifest does not name is always a
    difference, since DeepSpeed would unpickle it.
    """
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
