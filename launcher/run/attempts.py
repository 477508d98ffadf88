"""The attempts of a run: ``attempt.json`` while one is open, then a line of ``attempts.jsonl``.

An attempt that is killed cannot close itself; the next attempt closes it, from the files that are left.
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
from alignkd.run_folder.progress import read_snapshot
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
    HUNG = "hung"
    BAD_INPUT = "configuration error"
    BAD_NODE = "unusable node"  # a rank found no GPU on it
    REQUEUED = "requeued"  # by Slurm or an administrator, without a stated reason
    NODE_LOST = "node lost"
    NODE_AT_FAULT = "node at fault"  # bad input on one node only, in a run that has trained on others
    LOST = "lost"  # killed before it recorded why, although all its nodes are up: too little grace, say


FAILURES = (Reason.CRASHED, Reason.HUNG, Reason.BAD_NODE, Reason.BAD_INPUT)


@dataclass(frozen=True)
class Attempt:
    """Times are Unix seconds. ``last_step`` is the last step that was computed, ``saved_step`` that of the
    newest checkpoint; the steps between them are lost. ``first_step`` is that of the newest checkpoint when
    the attempt began, and once it is closed, that of the one it resumed from."""

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
    failed_rank: int | None = None  # the rank to blame
    exit_code: int | None = None  # of that rank
    failed_node: str | None = None  # the node of that rank, where it is known
    bad_nodes: tuple[str, ...] = ()  # lost, at fault, suspected of a hang, or without access to a folder

    @property
    def progressed(self) -> bool:
        return self.saved_step is not None and self.saved_step > self.first_step


_FIELDS = {field.name for field in fields(Attempt)}


def newest_step(run: Path) -> int:
    """Step of the newest committed checkpoint; 0 when there is none."""
    return next(iter(committed_steps(run)), 0)


def read_history(run: Path) -> list[Attempt]:
    """All closed attempts, oldest first. A line torn by a full disk or a power failure is skipped."""
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
    """Unknown fields, written by another version, are ignored."""
    try:
        known = {key: value for key, value in values.items() if key in _FIELDS}
        return Attempt(**{**known, "bad_nodes": tuple(known.get("bad_nodes", ()))})
    except (TypeError, AttributeError):
        return None


def open_attempt(run: Path) -> Attempt | None:
    """The attempt in ``attempt.json``. None also when it is in the history: the process that closed it was
    killed before it removed the file."""
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
) -> Attempt:
    """Open the next attempt, after ``close_killed``."""
    close_killed(run)
    for of_one_attempt in (RunPaths(run).exits, RunPaths(run).beats):
        shutil.rmtree(of_one_attempt, ignore_errors=True)
        of_one_attempt.mkdir(exist_ok=True)
    RunPaths(run).result.unlink(missing_ok=True)  # that of an earlier attempt
    number = max((closed.number for closed in read_history(run)), default=0) + 1
    attempt = Attempt(number, job, nodes, time.time(), newest_step(run), queue_seconds)
    write_json(RunPaths(run).open_attempt, asdict(attempt))
    return attempt


def close_killed(run: Path, lost: Callable[[str, float], Sequence[str]] = lambda _nodes, _since: ()) -> None:
    """Close an attempt that was killed, if there is one.

    ``lost`` returns which nodes of a node list have been lost since a Unix time: they explain why the killed
    attempt recorded no exit.
    """
    left = open_attempt(run)
    if left is not None:
        gone = tuple(lost(left.nodes, left.start))
        close(run, left, Reason.NODE_LOST if gone else Reason.LOST, gone, end=last_sign(run, left))


def close(
    run: Path,
    attempt: Attempt,
    reason: Reason,
    bad_nodes: Sequence[str] = (),
    end: float | None = None,
    codes: Mapping[int, int] | None = None,
    failed_node: str | None = None,
) -> Attempt:
    """Move the open attempt to the history. ``codes``: exit codes (default: those the ranks recorded)."""
    saved = newest_step(run)
    progress = read_snapshot(RunPaths(run).progress, attempt.start)
    # The ranks may have refused what seemed to be the newest checkpoint when the attempt began.
    resumed = None if progress is None else progress.resumed_step
    first = attempt.first_step if resumed is None else resumed
    last = max(saved, first, 0 if progress is None else progress.step)
    codes = exit_codes(run) if codes is None else codes
    failed = failed_rank(codes)
    closed = replace(
        attempt,
        first_step=first,
        end=time.time() if end is None else end,
        reason=str(reason),
        last_step=last,
        saved_step=saved,
        lost_steps=last - saved,
        failed_rank=failed,
        exit_code=None if failed is None else codes[failed],
        failed_node=failed_node,
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
    """Unix time of the attempt's last sign of life."""
    progress = read_snapshot(RunPaths(run).progress, since=attempt.start)
    return attempt.start if progress is None else progress.updated


def exit_codes(run: Path) -> dict[int, int]:
    """The exit codes that the ranks of this attempt recorded, in the order in which they ended.

    A rank that saw the records of others ended after them, whatever its node's clock says; the clocks decide
    between ranks that saw equally many.
    """
    found = []
    for path in RunPaths(run).exits.glob(exit_name("*")):
        text = path.read_text(encoding="utf-8")
        if text.endswith("\n"):  # else the rank is still writing it
            code, ended, *seen = text.split()  # earlier versions did not count the others
            rank = int(path.name.removeprefix(exit_name("")))
            found.append((int(seen[0]) if seen else 0, float(ended), rank, int(code)))
    return {rank: code for _, _, rank, code in sorted(found)}


def slurm_step(run: Path) -> str | None:
    """``JOB.STEP`` of this attempt's ranks; None until they have started."""
    try:
        return RunPaths(run).slurm_step.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
