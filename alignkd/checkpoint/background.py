"""Threads beside training, outside all collectives: writers of shards, and the removal of old checkpoints."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

from alignkd.checkpoint.storage import FileEntries


def start_thread(name: str, action: Callable[[], None]) -> threading.Thread:
    """Run ``action`` at once in a thread of its own."""

    def run() -> None:
        # Stop signals are for the main thread: here they could only interrupt a write.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT))
        action()

    # A daemon, so that a hung disk cannot keep a failed rank alive.
    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


class BackgroundWrite:
    """Runs ``action`` at once in a thread of its own."""

    def __init__(self, action: Callable[[], FileEntries]) -> None:
        self._action = action
        self._files: FileEntries = {}
        self._problem: str | None = "the writer ended without an answer"
        self.seconds = 0.0
        self._thread = start_thread("checkpoint-writer", self._run)

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self, limit: float) -> tuple[FileEntries, str | None]:
        """Wait for the end: the files, and what went wrong. A file system that hangs for ``limit`` seconds
        has failed; the thread is left to it."""
        self._thread.join(limit)
        if not self.done:
            return {}, f"not written within {limit:.0f} s; does the file system hang?"
        return self._files, self._problem

    def wait(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _run(self) -> None:
        started = time.monotonic()
        try:
            self._files = self._action()
            self._problem = None
        except OSError as error:
            self._problem = str(error)
        except Exception as error:  # the failure must be reported, and the save must not count as written
            self._problem = f"{type(error).__name__}: {error}"
        self.seconds = time.monotonic() - started
