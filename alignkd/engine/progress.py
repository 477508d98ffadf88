"""``progress.json``: what a run is doing now, for whoever looks at its folder. Replaced whole, never torn."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any


class Progress:
    """Written by rank 0, at most every ``interval`` seconds within a phase."""

    def __init__(self, run: Path, *, writes: bool, interval: float = 0.25) -> None:
        self._path = run / "progress.json"
        self._writes = writes
        self._interval = interval
        self._phase = ""
        self._written = 0.0

    def report(self, phase: str, **facts: Any) -> None:
        now = time.time()
        if not self._writes or (phase == self._phase and now - self._written < self._interval):
            return
        self._phase, self._written = phase, now
        temporary = self._path.with_suffix(".tmp")
        # A full disk must not end the run here: whether it can go on is for the next save to say.
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps({"phase": phase, **facts, "updated": now}), encoding="utf-8")
            temporary.replace(self._path)
