"""Wall time of optimizer steps on the host. Nothing here waits for the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class StepTime:
    seconds: float
    data_wait_share: float  # of these seconds, at most 1


class StepClock:
    """Times each step from the end of the one before. Saves and commits are paused: not part of any step."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        """``now``: seconds of a monotonic clock."""
        self._now = now
        self._edge = now()  # where the current step began, later by whatever was paused since
        self._waited = 0.0
        self._slowest = 0.0

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Inside, this rank waits for its data loader."""
        started = self._now()
        yield
        self._waited = self._now() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count as step time."""
        started = self._now()
        yield
        self._edge += self._now() - started

    def end_step(self) -> StepTime:
        now = self._now()
        seconds = now - self._edge
        self._edge = now
        self._slowest = max(self._slowest, seconds)
        return StepTime(seconds, min(self._waited / max(seconds, 1e-9), 1.0))

    def take_slowest(self) -> float:
        """Seconds of the slowest step since the last call; 0 when there was none."""
        slowest, self._slowest = self._slowest, 0.0
        return slowest
