"""Names in a run folder's ``checkpoints``, and what makes a checkpoint count.

| name | what it is |
|---|---|
| step-N/ | the checkpoint of optimizer step N |
| step-N/manifest.json | every other file of it with size and sha256, and what a resume must know |
| step-N/COMMITTED | the marker, written last: step and sha256 of the manifest (older ones are empty) |
| step-N/random-R.json | random states of rank R: ``alignkd.checkpoint.rank_state``; the rest: DeepSpeed |
| step-N.ATTEMPT.tmp/ | a save that is under way, or was cut off |
| step-N.universal/ | the same state in a form that any number of ranks can load; made from step-N |
| step-N.passed-over/ | marked, but damaged; found and put aside at a start |
| step-N.set-aside/ | newer than the step that a user went back to |
| step-N.unmarked/ | has a manifest but no marker; found at a start and put aside |
| latest | name of the newest checkpoint, for other tools; never read here |

A checkpoint is written as ``step-N.ATTEMPT.tmp``, gets its manifest, is renamed and marked. Only a marked
folder whose files fit its manifest is used. ``step-N.universal`` comes to count in the same way.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from pathlib import Path
from typing import Any

from alignkd.run_folder.paths import RunPaths

MANIFEST = "manifest.json"
MARKER = "COMMITTED"
PARTIAL = ".tmp"
UNIVERSAL = ".universal"
PASSED_OVER = ".passed-over"
SET_ASIDE = ".set-aside"
UNMARKED = ".unmarked"
_STEP = re.compile(r"step-(\d+)")


def step_name(step: int) -> str:
    return f"step-{step}"


def step_folder(run: Path, step: int) -> Path:
    return RunPaths(run).checkpoints / step_name(step)


def universal_folder(run: Path, step: int) -> Path:
    return RunPaths(run).checkpoints / (step_name(step) + UNIVERSAL)


def new_attempt(generation: int | None = None) -> str:
    """A name for what one process, or one group of ranks, writes; it tells a writer's ``generation``. Another
    one that still runs (on a node that was given up, for example) never writes into the same folder."""
    unique = uuid.uuid4().hex[:12]
    return unique if generation is None else f"{generation}-{unique}"


def partial_folder(final: Path, attempt: str) -> Path:
    """Where the ranks of ``attempt`` write what becomes ``final``; leftovers are found by the end of the
    name. ``"*"`` for the attempt gives the pattern of all."""
    return final.with_name(f"{final.name}.{attempt}{PARTIAL}")


def committed_steps(run: Path) -> list[int]:
    """Steps that carry the marker, newest first (their files are not looked at)."""
    found = step_folders(RunPaths(run).checkpoints)
    return [int(path.name.removeprefix("step-")) for path in found if is_marked(path)]


def is_marked(folder: Path) -> bool:
    return (folder / MARKER).is_file()


def marker_text(folder: Path) -> str:
    """What the marker of ``folder`` must hold: a marker of another manifest vouches for nothing. Raises
    OSError or ValueError when the manifest cannot be read."""
    content = (folder / MANIFEST).read_bytes()
    facts = {"step": json.loads(content)["step"], "manifest_sha256": hashlib.sha256(content).hexdigest()}
    return json.dumps(facts) + "\n"


def has_manifest(folder: Path) -> bool:
    """Whether all files of ``folder`` were once complete: the manifest is written after them. Its files are
    not looked at."""
    try:
        return isinstance(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def free_name(folder: Path, suffix: str) -> Path:
    """A name that is not taken, for ``folder`` to be put aside under."""
    number, place = 1, folder.with_suffix(suffix)
    while os.path.lexists(place):
        number += 1
        place = folder.with_suffix(f"{suffix}-{number}")
    return place


def was_put_aside(folder: Path) -> bool:
    """Whether ``folder`` was once renamed, under a name of :func:`free_name`."""
    suffixes = (PASSED_OVER, SET_ASIDE, UNMARKED)
    return any(True for suffix in suffixes for _ in folder.parent.glob(f"{folder.name}{suffix}*"))


def step_folders(parent: Path) -> list[Path]:
    """All ``step-N`` in ``parent``, marked or not, newest first."""
    found = {
        int(match[1]): path
        for path in (parent.iterdir() if parent.is_dir() else ())
        if (match := _STEP.fullmatch(path.name))
    }
    return [found[step] for step in sorted(found, reverse=True)]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the checkpoint, or of the conversion, in ``folder``. Raises ValueError for one of
    another step: that folder was renamed, and its state would be trained on as if it were this step's."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if _STEP.fullmatch(folder.name) and step_name(manifest["step"]) != folder.name:
        raise ValueError(f"it describes step {manifest['step']}")
    return manifest


def stored_bytes(manifest: dict[str, Any]) -> int:
    """Of all files that ``manifest`` describes."""
    return sum(int(entry["bytes"]) for entry in manifest["files"].values())
