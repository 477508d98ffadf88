"""What the user sees while ranks work: a progress bar on a terminal, a line now and then elsewhere.

Rank 0 replaces ``progress.json`` in the run folder; here it is read and shown.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from alignkd.run_folder.progress import Snapshot

PLAIN_SECONDS = 10.0
NOTABLE_WAIT = 0.05  # share of a step


@dataclass
class Pace:
    """Seconds left, from the steps that were seen since the first one (a resumed run does not start at 0)."""

    _first: Snapshot | None = field(default=None)

    def seconds_left(self, now: Snapshot) -> float | None:
        if now.phase not in ("training", "saving") or now.total_steps is None or now.step == 0:
            return None
        if self._first is None:
            self._first = now
        steps, seconds = now.step - self._first.step, now.updated - self._first.updated
        return seconds / steps * (now.total_steps - now.step) if steps > 0 else None


def details(now: Snapshot, left: float | None) -> str:
    """``training · loss 2.314 · 12.3 samples/s · 4:05 left``"""
    parts = [now.phase if now.done is None else f"{now.phase} {now.done:.0%}"]
    if now.loss is not None:
        parts.append(f"loss {now.loss:.4g}")
    if now.samples_per_second is not None:
        parts.append(f"{now.samples_per_second:.3g} samples/s")
    if left is not None:
        parts.append(f"{duration(left)} left")
    if now.data_wait_share is not None and now.data_wait_share > NOTABLE_WAIT:
        parts.append(f"{now.data_wait_share:.0%} waiting for data")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """``4:05`` or ``1:04:05``."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class View(Protocol):
    def show(self, now: Snapshot, left: float | None) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


class BarView:
    """A live bar, refreshed by ``show`` alone: no thread beside the one that watches the ranks."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            auto_refresh=False,
        )
        self._task = self._progress.add_task("starting", total=None)
        self._progress.start()

    def show(self, now: Snapshot, left: float | None) -> None:
        # An index has no steps: its bar is in percent.
        total, completed = (now.total_steps, now.step) if now.done is None else (100, int(100 * now.done))
        self._progress.update(self._task, total=total, completed=completed, description=details(now, left))
        self._progress.refresh()

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.refresh()
        self._progress.stop()


class PlainView:
    """One line when the phase changes and every few seconds, for logs and pipes."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._last: tuple[str, int, float | None] | None = None
        self._last_time = 0.0

    def show(self, now: Snapshot, left: float | None) -> None:
        # Saving is a part of training here: it comes and goes with every checkpoint.
        phase = "training" if now.phase == "saving" else now.phase
        same_phase = self._last is not None and self._last[0] == phase
        at = (phase, now.step, now.done)
        due = self._clock() - self._last_time >= PLAIN_SECONDS and at != self._last
        if same_phase and not due:
            return
        self._last, self._last_time = at, self._clock()
        done = f"step {now.step}/{now.total_steps}: " if now.total_steps is not None else ""
        self.note(done + details(now, left))

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        pass


GONE = (OSError, SystemExit)  # output that nobody sees any more; rich would exit where a pipe is closed


class LastingView:
    """Falls silent when the terminal is closed or nobody reads the pipe: the ranks must not die of it."""

    def __init__(self, make: Callable[[], View]) -> None:
        self._view: View | None = None
        with contextlib.suppress(*GONE):
            self._view = make()

    def show(self, now: Snapshot, left: float | None) -> None:
        self._try(lambda view: view.show(now, left))

    def note(self, text: str) -> None:
        self._try(lambda view: view.note(text))

    def close(self) -> None:
        self._try(lambda view: view.close())

    def _try(self, act: Callable[[View], None]) -> None:
        if self._view is None:
            return
        try:
            act(self._view)
        except GONE:
            view, self._view = self._view, None
            with contextlib.suppress(*GONE):
                view.close()  # a bar has taken over stdout


def make_view(console: Console) -> View:
    return BarView(console) if console.is_terminal else PlainView(console)
