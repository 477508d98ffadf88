"""What a run left behind, seen from outside: what it promised, what it lost, and whether it equals the
undisturbed run."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkd.run_folder.atomic_files import read_json
from alignkd.run_folder.checkpoints import committed_steps
from alignkd.run_folder.metrics import iter_rows
from alignkd.run_folder.paths import RunPaths
from tests.tiny import TIMES

_SAVED = re.compile(r"saved step-(\d+)")
_RESUMED = re.compile(r"resumed at step (\d+)")
_PASSED_OVER = re.compile(r"passed over (.*)")


def rows(run: Path) -> list[dict[str, Any]]:
    return list(iter_rows(RunPaths(run).metrics))


@dataclass(frozen=True)
class Left:
    """Behind a start of a run that has ended."""

    resumed: int | None  # step that this start resumed from; None when it was killed before it said so
    began: bool  # it has trained
    promised: int  # newest checkpoint that rank 0's log ever called saved
    committed: int  # newest checkpoint with the marker
    computed: int  # last step
    passed_over: tuple[str, ...]  # in this start


def look(run: Path, log_offset: int) -> Left:
    """``log_offset``: size of rank 0's log before this start."""
    path = run / "logs" / "rank-0.log"
    whole = path.read_bytes() if path.exists() else b""
    new = whole[log_offset:].decode(errors="replace")
    resumed = [int(step) for step in _RESUMED.findall(new)]
    saved = [int(step) for step in _SAVED.findall(whole.decode(errors="replace"))]
    committed = next(iter(committed_steps(run)), 0)
    progress = read_json(RunPaths(run).progress) or {}
    made = [row["step"] for row in rows(run)][-1:]
    began = progress.get("phase") in ("training", "saving", "exporting", "done")
    # Rows of a start that did not come to training are older ones, not yet cut.
    computed = max([committed, *made, int(progress.get("step", 0))]) if began else committed
    return Left(
        resumed=resumed[-1] if resumed else (0 if began and "resumed" not in new else None),
        began=began,
        promised=max(saved, default=0),
        committed=committed,
        computed=computed,
        passed_over=tuple(_PASSED_OVER.findall(new)),
    )


def differing_rows(run: Path, expected: Path) -> list[int]:
    """Steps whose rows differ in anything but times; rows that only one side has count, too."""
    ours, theirs = rows(run), rows(expected)
    wrong = [
        row["step"]
        for row, other in zip(ours, theirs, strict=False)
        if {key: row[key] for key in row.keys() - TIMES} != {key: other[key] for key in other.keys() - TIMES}
    ]
    longer = ours if len(ours) > len(theirs) else theirs
    return wrong + [row["step"] for row in longer[min(len(ours), len(theirs)) :]]


def weights_hash(run: Path) -> str:
    return hashlib.sha256((run / "student" / "model.safetensors").read_bytes()).hexdigest()
