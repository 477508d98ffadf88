"""Waiting for what another host has written: a network file system may show it up to half a minute later."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE_SECONDS = 30.0  # network file systems show what another host wrote that much later
PAUSE_SECONDS = 1.0


class Patience:
    """Waits ``seconds`` in all, however often it is asked: a checkpoint may lack a thousand files."""

    def __init__(
        self,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._left = seconds
        self._clock, self._sleep = clock, sleep

    def until(self, holds: Callable[[], bool]) -> bool:
        """Whether ``holds``, at once or before the patience is used up."""
        while not holds():
            if self._left <= 0:
                return False
            started = self._clock()
            self._sleep(min(PAUSE_SECONDS, self._left))
            self._left -= self._clock() - started
        return True

    def until_exists(self, path: Path) -> bool:
        def exists() -> bool:
            with contextlib.suppress(OSError):
                os.listdir(path.parent)  # NFS looks at the server again
            return path.exists()

        return path.exists() or self.until(exists)
