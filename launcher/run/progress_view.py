"""What the user sees while ranks work: a progress bar on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from alignkd.run_folder.progress import Snapshot
from alignkd.text import duration
from launcher.run.console import say

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_SECONDS = 10.0
NOTABLE_WAIT = 0.05  # share of a step
_AT_WORK = ("training", "evaluating", "saving")


@dataclass
class Pace:
    """Estimates the time left from the steps seen so far. A resumed run does not start at step 0."""

    _first: Snapshot | None = field(default=None)

    def seconds_left(self, now: Snapshot) -> float | None:
        if now.phase not in _AT_WORK or now.total_steps is None or now.step == 0:
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


class View(Protocol):
    def show(self, now: Snapshot, left: float | None) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


class BarView:
    """A live bar, refreshed only by ``show``: it needs no thread of its own."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

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
        # Indexing has no steps: its bar counts percent.
        total, completed = (now.total_steps, now.step) if now.done is None else (100, int(100 * now.done))
        self._progress.update(self._task, total=total, completed=completed, description=details(now, left))
        self._progress.refresh()

    def note(self, text: str) -> None:
        say(self._progress.console, text)

    def close(self) -> None:
        self._progress.refresh()
        self._progress.stop()


class PlainView:
    """For logs and pipes: one line when the phase changes, and one every few seconds."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._last: tuple[str, int, float | None] | None = None
        self._last_time = 0.0

    def show(self, now: Snapshot, left: float | None) -> None:
        # These come and go all the time, and count as training here.
        phase = "training" if now.phase in _AT_WORK else now.phase
        same_phase = self._last is not None and self._last[0] == phase
        at = (phase, now.step, now.done)
        due = self._clock() - self._last_time >= PLAIN_SECONDS and at != self._last
        if same_phase and not due:
            return
        self._last, self._last_time = at, self._clock()
        done = f"step {now.step}/{now.total_steps}: " if now.total_steps is not None else ""
        self.note(done + details(now, left))

    def note(self, text: str) -> None:
        say(self._console, text)

    def close(self) -> None:
        pass


GONE = (OSError, SystemExit)  # raised when the output is closed; rich exits where it is a pipe


class LastingView:
    """Shows nothing more once the terminal or the pipe is closed: that must not end the ranks."""

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
                view.close()  # a bar has redirected stdout


def make_view(console: Console) -> View:
    return BarView(console) if console.is_terminal else PlainView(console)
