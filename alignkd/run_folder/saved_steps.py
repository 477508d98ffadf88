"""What a run's own records say about saves, for a start that sees no checkpoint.

Without a checkpoint a run would train from step 0 and cut its metrics. That is right when nothing was ever
saved, and destroys evidence when the markers were lost or the folder is not mounted. ``from_scratch.json``
holds the number of the last attempt whose saves the user has given up (``alignkd resume --from-scratch``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkd.config import load_run_config
from alignkd.run_folder.atomic_files import read_json
from alignkd.run_folder.checkpoints import MARKER, committed_steps, has_manifest, step_folders
from alignkd.run_folder.metrics import iter_rows, last_rows
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.progress import saved_step

LAST_ATTEMPT = "last_attempt"  # key of from_scratch.json


@dataclass(frozen=True)
class RecordedSave:
    step: int
    source: str  # which file says so, and how


def recorded_save(run: Path) -> RecordedSave | None:
    """The newest step that must have been saved; None when the records know of none."""
    return max(_records(run), key=lambda record: record.step, default=None)


def missing_checkpoints(run: Path) -> str | None:
    """Why a start from step 0 would destroy evidence; None when there is a checkpoint, or never was."""
    known = None if committed_steps(run) else recorded_save(run)
    if known is None:
        return None
    folder = RunPaths(run).checkpoints
    whole = [path.name for path in step_folders(folder) if has_manifest(path)]
    lines = [
        f"{folder}: no checkpoint is visible, but step {known.step} was saved ({known.source}); nothing was "
        "changed",
        "If the folder is not mounted or was moved, bring it back and resume.",
    ]
    if whole:
        lines.append(
            f"{', '.join(whole)}: only the marker is missing. `touch {folder}/{whole[0]}/{MARKER}` restores "
            "it; all files are hashed before they are used."
        )
    lines.append(f"To give up what was saved and train from step 0: `alignkd resume {run} --from-scratch`.")
    return "\n  ".join(lines)


def _records(run: Path) -> Iterator[RecordedSave]:
    paths = RunPaths(run)
    given_up = _number(read_json(paths.from_scratch) or {}, LAST_ATTEMPT)
    for attempt in [*iter_rows(paths.attempts), read_json(paths.open_attempt) or {}]:
        step = max(_number(attempt, "saved_step"), _number(attempt, "first_step"))
        if step and _number(attempt, "number") > given_up:
            yield RecordedSave(step, f"{paths.attempts.name}: attempt {attempt['number']}")
    if step := saved_step(run) or 0:
        yield RecordedSave(step, paths.progress.name)
    section = load_run_config(paths.config).checkpoint
    rows = _number((last_rows(paths.metrics, 1) or [{}])[0], "step")
    # A run that has failed to save this often in a row has ended.
    if rows > section.every * (section.max_failures + 1):
        yield RecordedSave(
            section.every * (rows // section.every - section.max_failures),
            f"{paths.metrics.name} has rows up to step {rows}",
        )


def _number(values: Mapping[str, Any], key: str) -> int:
    """0 for anything else."""
    value = values.get(key)
    return value if isinstance(value, int) else 0


def give_up_text(last_attempt: int) -> str:
    """Contents of ``from_scratch.json``."""
    return json.dumps({LAST_ATTEMPT: last_attempt}) + "\n"
