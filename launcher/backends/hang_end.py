"""What is recorded before ranks that hang are killed: the stacks of every rank, and who is behind."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from alignkd.errors import ERROR_PREFIX
from alignkd.run_folder.paths import RunPaths
from launcher.run.hangs import Hang, write_hang

STACK_SECONDS = 5.0  # that the ranks are given


def record_hang(run: Path, world_size: int, hang: Hang, ask_for_stacks: Callable[[], object]) -> Hang:
    """Returns the hang with what came of asking: ``ask_for_stacks`` sends SIGUSR2 to every rank, on which
    faulthandler writes all stacks into the rank's log."""
    logs = [RunPaths(run).log(rank) for rank in range(world_size)]
    before = [_size(log) for log in logs]
    ask_for_stacks()
    end = time.monotonic() + STACK_SECONDS
    while time.monotonic() < end and any(_size(log) == size for log, size in zip(logs, before, strict=True)):
        time.sleep(0.1)
    time.sleep(0.2)  # a log that grows may not be complete
    silent = [rank for rank, log in enumerate(logs) if _size(log) == before[rank]]
    message = hang.message
    if silent:
        names = ", ".join(str(rank) for rank in silent[:8]) + (" ..." if len(silent) > 8 else "")
        message += (
            f"\n  no stacks of rank {names}: a process that is stopped cannot write them; "
            "those of the others are in their logs"
        )
    told = Hang(hang.ranks, hang.nodes, message)
    with contextlib.suppress(OSError):
        write_hang(run, told)
    for rank in told.ranks[:8] or (0,):
        with contextlib.suppress(OSError), logs[rank].open("a", encoding="utf-8") as log:
            log.write(f"\n{ERROR_PREFIX}{message}\n")
    return told


def _size(log: Path) -> int:
    try:
        return log.stat().st_size
    except OSError:
        return 0
