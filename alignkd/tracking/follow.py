"""Follows ``metrics.jsonl`` and hands its new rows to one tracker, until the run is over."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from alignkd.run_folder.atomic_files import read_json, write_text_atomic
from alignkd.run_folder.metrics import RowReader
from alignkd.run_folder.paths import RunPaths
from alignkd.tracking.scalars import scalars

log = logging.getLogger(__name__)


class Tracker(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def flush(self) -> None:
        """What was written so far counts from here on."""
        ...

    def close(self) -> None: ...


class TrackerState:
    """``tracking/NAME.json``: the last step that a tracker has written, and what else it must remember."""

    def __init__(self, run: Path, name: str) -> None:
        self.folder = RunPaths(run).tracking
        self._path = self.folder / f"{name}.json"
        self.values: dict[str, Any] = read_json(self._path) or {}

    @property
    def step(self) -> int:
        step = self.values.get("step")
        return step if isinstance(step, int) else 0

    def save(self, **values: Any) -> None:
        """Raises OSError."""
        self.values |= values
        self.folder.mkdir(exist_ok=True)
        write_text_atomic(self._path, json.dumps(self.values) + "\n", durable=False)


def follow(
    run: Path,
    name: str,
    open_tracker: Callable[[TrackerState], tuple[Tracker, int]],
    over: threading.Event,
    interval: float,
    owns_run: Callable[[], bool],
) -> None:
    """Write every row after the last step that the tracker has, until ``over`` is set and no row is left, or
    until another attempt owns the run, which writes its rows itself.

    ``open_tracker`` also gives the last step that counts as written. A tracker that fails is given up with
    one warning; the next attempt continues where it was.
    """
    try:
        state = TrackerState(run, name)
        tracker, last = open_tracker(state)
        reader = RowReader(RunPaths(run).metrics)
        ends = False
        while not ends:
            ends = over.is_set()  # asked before reading: no row comes after it
            rows = [row for row in reader.read() if isinstance(row.get("step"), int) and row["step"] > last]
            if not owns_run():  # asked after reading: the rows may be the other attempt's
                log.warning("warning: tracking.%s ends: another process has taken over this run", name)
                break
            for row in rows:
                tracker.write(row["step"], scalars(row))
            if rows:
                tracker.flush()
                last = rows[-1]["step"]
                state.save(step=last)
            over.wait(interval)
        tracker.close()
    except (Exception, SystemExit) as error:  # its libraries may raise anything
        reason = str(error).strip() or type(error).__name__
        log.warning("warning: tracking.%s is off for this attempt: %s", name, reason.splitlines()[0])
