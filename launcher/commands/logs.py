"""``alignkd logs --follow``: the text of a log until the run ends, in a queue or without one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from launcher.commands.states import ONGOING
from launcher.commands.status import current_state
from launcher.run.logs import follow, is_over

QUEUE_SECONDS = 30.0  # between two questions to Slurm


def follow_run(run: Path, rank: int) -> Iterator[str]:
    """Raises UserError when the run has ended without a log of this rank."""
    return follow(run, rank, RunEnded(run))


class RunEnded:
    """Has the run ended? The files are read at every call, its state is asked for every 30 seconds only."""

    def __init__(self, run: Path, seconds: float = QUEUE_SECONDS) -> None:
        self._run = run
        self._seconds = seconds
        self._asked = 0.0

    def __call__(self) -> bool:
        if is_over(self._run):
            return True
        if time.monotonic() - self._asked < self._seconds:
            return False
        self._asked = time.monotonic()
        return current_state(self._run).state not in ONGOING
