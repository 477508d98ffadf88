"""``progress.json``: what a run is doing now, for whoever looks at its folder. Replaced whole, never torn."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignkd.run_folder.atomic_files import write_text_atomic
from alignkd.run_folder.paths import RunPaths


class Progress:
    """Written by rank 0, at most every ``interval`` seconds within a phase."""

    def __init__(self, run: Path, *, writes: bool, interval: float = 0.25) -> None:
        self._path = RunPaths(run).progress
        self._writes = writes
        self._interval = interval
        self._phase = ""
        self._written = 0.0

    def report(self, phase: str, **facts: Any) -> None:
        now = time.time()
        if not self._writes or (phase == self._phase and now - self._written < self._interval):
            return
        self._phase, self._written = phase, now
        text = json.dumps({"phase": phase, **facts, "updated": now})
        # A full disk must not end the run here: whether it can continue is for the next save to say.
        with contextlib.suppress(OSError):
            write_text_atomic(self._path, text, durable=False)

    @contextlib.contextmanager
    def alive(self, phase: str, every: float = 30.0, **facts: Any) -> Iterator[None]:
        """A phase that may be long and has no steps: reported again and again, or it would look dead."""
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
