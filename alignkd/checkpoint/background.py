"""A thread that writes one rank's files of one checkpoint. It takes part in no collective."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

from alignkd.checkpoint.storage import FileEntries


class BackgroundWrite:
    """Runs ``action`` at once in a thread of its own."""

    def __init__(self, action: Callable[[], FileEntries]) -> None:
        self._action = action
        self._files: FileEntries = {}
        self._problem: str | None = "the writer ended without an answer"
        self.seconds = 0.0
        # A daemon, so that a hung disk cannot keep a failed rank alive.
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

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
        # Stop signals are for the main thread: here they could only interrupt a write.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT))
        started = time.monotonic()
        try:
            self._files = self._action()
            self._problem = None
        except OSError as error:
            self._problem = str(error)
        except Exception as error:  # the failure must be reported, and the save must not count as written
            self._problem = f"{type(error).__name__}: {error}"
        self.seconds = time.monotonic() - started
