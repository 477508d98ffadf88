"""``progress.json``: what a run is doing now. Rank 0 replaces it, at most a few times a second; never torn.

| key | holds |
|---|---|
| phase | starting, indexing, loading, converting, training, evaluating, saving, exporting, done or stopped |
| updated | Unix time |
| step, total_steps | optimizer steps |
| resumed_step | step that this start resumed from; 0 for none |
| done, total | of the data's files, while indexing; ``done`` also windows, while evaluating |
| loss, samples_per_second, data_wait_share | of the last row of ``metrics.jsonl`` |
| saved_step | newest checkpoint, in every phase: a start takes it over from the one before |
| save_held_seconds | what saves have cost training so far |

Keys that a phase does not know are missing or null.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkd.run_folder.atomic_files import read_json, write_text_atomic
from alignkd.run_folder.heartbeat import Heartbeat
from alignkd.run_folder.paths import RunPaths


class Progress:
    """The writer. Within a phase it writes at most every ``interval`` seconds."""

    def __init__(
        self, run: Path, *, writes: bool, interval: float = 0.25, heartbeat: Heartbeat | None = None
    ) -> None:
        """``writes`` is true on rank 0; elsewhere only the ``heartbeat`` of this rank is told."""
        self._heartbeat = heartbeat
        self._path = RunPaths(run).progress
        self._writes = writes
        self._interval = interval
        self._phase = ""
        self._written = 0.0
        # By it a start notices that checkpoints are missing, although they were there before.
        self._saved_step = saved_step(run) if writes else None

    def report(self, phase: str, **facts: Any) -> None:
        self.enter(phase, facts.get("step"), facts.get("done"))
        now = time.time()
        self._saved_step = facts.get("saved_step", self._saved_step)
        if not self._writes or (phase == self._phase and now - self._written < self._interval):
            return
        self._phase, self._written = phase, now
        text = json.dumps({"phase": phase, **facts, "saved_step": self._saved_step, "updated": now})
        # A full disk must not end the run here: whether it can continue is for the next save to say.
        with contextlib.suppress(OSError):
            write_text_atomic(self._path, text, durable=False)

    def enter(self, phase: str, step: int | None = None, done: int | None = None) -> None:
        """For phases of a step, which are too short to be written."""
        if self._heartbeat is not None:
            self._heartbeat.enter(phase, step, done)

    def end_step(self, step: int, times: tuple[float, float] | None) -> None:
        """See ``Heartbeat.end_step``."""
        if self._heartbeat is not None:
            self._heartbeat.end_step(step, times)

    @contextlib.contextmanager
    def alive(self, phase: str, every: float = 30.0, **facts: Any) -> Iterator[None]:
        """Report a phase that may be long and has no steps again and again: it would look dead otherwise."""
        over = threading.Event()

        def beat() -> None:
            self.report(phase, **facts)
            while not over.wait(every):
                self.report(phase, **facts)

        thread = threading.Thread(target=beat, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def saved_step(run: Path) -> int | None:
    """The newest checkpoint by ``progress.json``; None when it does not say."""
    step = (read_json(RunPaths(run).progress) or {}).get("saved_step")
    return step if isinstance(step, int) else None


@dataclass(frozen=True)
class Snapshot:
    """What a reader gets."""

    phase: str = "starting"
    step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    samples_per_second: float | None = None
    updated: float = 0.0  # Unix time
    done: float | None = None  # share of the data's files, while indexing
    data_wait_share: float | None = None  # of the step, for which a rank waited for its samples
    resumed_step: int | None = None  # None until the start knows


def read_snapshot(path: Path, since: float = 0.0) -> Snapshot | None:
    """The newest progress; None while there is none that was written at the Unix time ``since`` or later (not
    one of an earlier start)."""
    values = read_json(path) or {}
    updated = _number(values.get("updated"))
    if updated is None or updated < since:
        return None
    total, step, resumed = (values.get(key) for key in ("total_steps", "step", "resumed_step"))
    return Snapshot(
        phase=str(values.get("phase", "training")),
        step=step if isinstance(step, int) else 0,
        total_steps=total if isinstance(total, int) and total > 0 else None,
        loss=_number(values.get("loss")),
        samples_per_second=_number(values.get("samples_per_second")),
        updated=updated,
        done=_share(values.get("done"), values.get("total")),
        data_wait_share=_number(values.get("data_wait_share")),
        resumed_step=resumed if isinstance(resumed, int) else None,
    )


def _share(done: object, total: object) -> float | None:
    part, whole = _number(done), _number(total)
    return part / whole if part is not None and whole else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
