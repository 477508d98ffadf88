"""``beats/rank-R``: what each rank is doing. The watch for hangs reads it, and `alignkd status`.

The training thread only sets attributes; a thread of its own writes them every few seconds. So training never
waits for the file system, and a rank whose beats stop is one whose process cannot run: it is stopped, or its
node is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import threading
from collections import deque
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from alignkd.run_folder.paths import RunPaths

DATA, TRAINING = "waiting for data", "training"
STEP_PHASES = (DATA, TRAINING)  # a rank passes both in every step
# In the order in which a rank comes to them after its last finished step.
PHASES = (
    "importing",
    "joining",
    "starting",
    "indexing",
    "loading",
    "converting",
    "evaluating",
    "saving",
    *STEP_PHASES,
    "exporting",
    "stopped",
    "done",
    "ended",
)
_BYTES = 1024  # fixed: a single write replaces the content
_LATE_STEPS = 20  # that the times are taken from


def beat_seconds(hang_seconds: float) -> float:
    """Between two beats."""
    return min(10.0, max(0.25, hang_seconds / 20)) if hang_seconds else 10.0


@dataclass(frozen=True)
class Beat:
    """Times are medians over the last steps, in seconds."""

    phase: str = "importing"
    step: int = 0  # the last one that is done
    steps: int = 0  # done since this process started
    done: int | None = None  # of the data's files, while indexing
    moves: int = 0  # changes of the values above
    count: int = 0  # of beats
    step_seconds: float | None = None
    own_seconds: float | None = None  # of a step, without waiting for other ranks


_FIELDS = {field.name for field in fields(Beat)}


def read_beat(run: Path, rank: int) -> Beat | None:
    """None while there is none, and for one that is being replaced."""
    try:
        values = json.loads(RunPaths(run).beat(rank).read_bytes())
        return Beat(**{key: value for key, value in values.items() if key in _FIELDS})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


class Heartbeat:
    """The writer of one rank. A context manager: the thread runs inside."""

    def __init__(self, run: Path, rank: int, interval: float) -> None:
        self._path = RunPaths(run).beat(rank)
        self._interval = interval
        self._beat = Beat()
        self._times: deque[tuple[float, float]] = deque(maxlen=_LATE_STEPS)
        self._wake = threading.Event()
        self._over = False
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.enter("ended")
        self._over = True
        self._wake.set()
        self._thread.join(timeout=self._interval)  # the file system may not answer

    def enter(self, phase: str, step: int | None = None, done: int | None = None) -> None:
        """This rank is in ``phase`` now, after ``step``. Cheap: may be called several times a step."""
        now = self._beat
        step = now.step if step is None else step
        if (phase, step, done) == (now.phase, now.step, now.done):
            return
        self._beat = replace(now, phase=phase, step=step, done=done, moves=now.moves + 1)
        if phase != now.phase and phase not in STEP_PHASES:
            self._wake.set()

    def end_step(self, step: int, times: tuple[float, float] | None) -> None:
        """``step`` is done. ``times`` are those of the last step for which they are known: the seconds that
        it took, and those of them in which this rank did not wait for others."""
        if times is not None:
            self._times.append(times)
        now = self._beat
        self._beat = replace(now, step=step, steps=now.steps + 1, moves=now.moves + 1)

    def _run(self) -> None:
        count = 0
        while not self._over:
            self._wake.clear()
            count += 1
            self._write(count)
            self._wake.wait(self._interval)
        self._write(count + 1)

    def _write(self, count: int) -> None:
        times = list(self._times)
        values = replace(
            self._beat,
            count=count,
            step_seconds=statistics.median(step for step, _ in times) if times else None,
            own_seconds=statistics.median(own for _, own in times) if times else None,
        )
        # A failure must not end the run: whether it can continue is for the next save to say.
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(exist_ok=True)
            # Opened each time: on a network file system, other nodes see what was written once it is closed.
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, json.dumps(asdict(values)).encode().ljust(_BYTES))
            finally:
                os.close(descriptor)
