"""The attempts of a run: ``attempt.json`` while one is open, then one line of ``attempts.jsonl``.

An attempt that is killed cannot close itself; whoever looks next (the following attempt, `alignkd resume`)
closes it from the files that it left.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from alignkd.run_folder.atomic_files import read_json, write_json
from alignkd.run_folder.checkpoints import committed_steps
from alignkd.run_folder.paths import RunPaths, exit_name
from launcher.run.exit_codes import failed_rank


class Reason(StrEnum):
    """Why an attempt ended, as ``attempts.jsonl`` records it."""

    DONE = "done"
    STOPPED = "stopped"
    TIME_LIMIT = "time limit"
    PREEMPTED = "preempted"
    CANCELLED = "cancelled"
    TERMINATED = "terminated"
    CRASHED = "crashed"
    BAD_INPUT = "configuration error"
    REQUEUED = "requeued"  # by Slurm or an administrator, without a stated reason
    NODE_LOST = "node lost"
    LOST = "lost"  # killed before it could record why, though all its nodes are up: too short a grace, say


@dataclass(frozen=True)
class Attempt:
    """Times are Unix seconds. ``last_step`` is the last step that was computed, ``saved_step`` the newest
    checkpoint; what lies between them is lost."""

    number: int
    job: str
    nodes: str
    start: float
    first_step: int
    queue_seconds: float | None = None
    end: float | None = None
    reason: str | None = None
    last_step: int | None = None
    saved_step: int | None = None
    lost_steps: int | None = None
    failed_rank: int | None = None  # the one that is to blame
    exit_code: int | None = None  # its exit code
    bad_nodes: tuple[str, ...] = ()  # lost, or blind to the run folder

    @property
    def progressed(self) -> bool:
        return self.saved_step is not None and self.saved_step > self.first_step


_FIELDS = {field.name for field in fields(Attempt)}


def newest_step(run: Path) -> int:
    """Step of the newest committed checkpoint; 0 when there is none."""
    return next(iter(committed_steps(run)), 0)


def read_history(run: Path) -> list[Attempt]:
    """All closed attempts, oldest first. A line that was torn by a full disk or a power cut is left out."""
    try:
        lines = RunPaths(run).attempts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [attempt for line in lines if (attempt := _parse(line)) is not None]


def _parse(line: str) -> Attempt | None:
    try:
        return _attempt(json.loads(line))
    except ValueError:
        return None


def _attempt(values: Any) -> Attempt | None:
    """Fields of another version are left out."""
    try:
        known = {key: value for key, value in values.items() if key in _FIELDS}
        return Attempt(**{**known, "bad_nodes": tuple(known.get("bad_nodes", ()))})
    except (TypeError, AttributeError):
        return None


def open_attempt(run: Path) -> Attempt | None:
    """None also for one that is in the history: whoever closed it was killed before it removed the file."""
    values = read_json(RunPaths(run).open_attempt)
    attempt = None if values is None else _attempt(values)
    if attempt is None or any(closed.number == attempt.number for closed in read_history(run)):
        return None
    return attempt


def begin(
    run: Path,
    job: str,
    nodes: str,
    queue_seconds: float | None,
    lost: Callable[[str, float], Sequence[str]] = lambda _nodes, _since: (),
) -> Attempt:
    """Open the next attempt; one that was killed before is closed first.

    ``lost`` tells which nodes of a list are gone since a Unix time: why that attempt left no word.
    """
    left = open_attempt(run)
    if left is not None:
        gone = tuple(lost(left.nodes, left.start))
        close(run, left, Reason.NODE_LOST if gone else Reason.LOST, gone, end=last_sign(run, left))
    shutil.rmtree(RunPaths(run).exits, ignore_errors=True)
    RunPaths(run).exits.mkdir(exist_ok=True)
    RunPaths(run).result.unlink(missing_ok=True)  # of the attempt before: it would speak for this one
    number = max((closed.number for closed in read_history(run)), default=0) + 1
    attempt = Attempt(number, job, nodes, time.time(), newest_step(run), queue_seconds)
    write_json(RunPaths(run).open_attempt, asdict(attempt))
    return attempt


def close(
    run: Path,
    attempt: Attempt,
    reason: Reason,
    bad_nodes: Sequence[str] = (),
    end: float | None = None,
    codes: Mapping[int, int] | None = None,
) -> Attempt:
    """Move the open attempt to the history. ``codes`` are those that the ranks wrote down, unless given."""
    saved = newest_step(run)
    last = max(saved, attempt.first_step, _computed_step(run, attempt.start))
    codes = exit_codes(run) if codes is None else codes
    failed = failed_rank(codes)
    closed = replace(
        attempt,
        end=time.time() if end is None else end,
        reason=str(reason),
        last_step=last,
        saved_step=saved,
        lost_steps=last - saved,
        failed_rank=failed,
        exit_code=None if failed is None else codes[failed],
        bad_nodes=tuple(bad_nodes),
    )
    with RunPaths(run).attempts.open("ab+") as file:
        torn = file.tell() > 0 and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        file.write(b"\n" * torn + json.dumps(asdict(closed)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    RunPaths(run).open_attempt.unlink(missing_ok=True)
    return closed


def last_sign(run: Path, attempt: Attempt) -> float:
    """When the attempt was last heard of."""
    values = read_json(RunPaths(run).progress) or {}
    updated = values.get("updated")
    return max(attempt.start, updated) if isinstance(updated, float | int) else attempt.start


def _computed_step(run: Path, since: float) -> int:
    values: dict[str, Any] = read_json(RunPaths(run).progress) or {}
    step, updated = values.get("step"), values.get("updated")
    current = isinstance(step, int) and isinstance(updated, float | int) and updated >= since
    return int(values["step"]) if current else 0


def exit_codes(run: Path) -> dict[int, int]:
    """Exit codes that the ranks of this attempt wrote down, in the order of their ends."""
    found = []
    for path in RunPaths(run).exits.glob(exit_name("*")):
        text = path.read_text(encoding="utf-8")
        if text.endswith("\n"):  # else it is being written
            code, ended = text.split()
            found.append((float(ended), int(path.name.removeprefix(exit_name(""))), int(code)))
    return {rank: code for _, rank, code in sorted(found)}


def slurm_step(run: Path) -> str | None:
    """``JOB.STEP`` of this attempt's ranks; None while none has started."""
    try:
        return RunPaths(run).slurm_step.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def fruitless_restarts(run: Path) -> int:
    """Attempts in a row that failed without a new checkpoint, since the user last submitted the run.

    A preemption or a lost node is not the run's fault and does not count.
    """
    submitted = (read_json(RunPaths(run).job) or {}).get("attempts_before", 0)
    count = 0
    for attempt in reversed(read_history(run)[submitted:]):
        if attempt.progressed:
            break
        if attempt.reason in (Reason.CRASHED, Reason.TIME_LIMIT):
            count += 1
    return count
