"""Signals as flags. Imported before torch: a USR1 during torch's import would kill the rank otherwise."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

from alignkd.errors import EXIT_SAVED_ON_TERM, EXIT_SAVED_ON_USR1


class StopRequest:
    """Which stop signals this process has received. The handlers set flags and do nothing else; the training
    loop agrees on them with the other ranks at the next step edge."""

    def __init__(self) -> None:
        self.usr1 = False
        self.term = False

    def install(self) -> None:
        signal.signal(signal.SIGUSR1, self._on_usr1)
        signal.signal(signal.SIGTERM, self._on_term)
        for number in (signal.SIGUSR1, signal.SIGTERM):
            # A write or a socket of C++ code is continued, not cut short.
            signal.siginterrupt(number, False)

    def read(self, path: Path) -> None:
        """What `alignkd stop` and `cancel` leave in the run folder before they send a signal, which comes too
        early for a rank that is only about to start."""
        try:
            words = path.read_text(encoding="utf-8").split()
        except OSError:
            return
        self.usr1 = self.usr1 or "USR1" in words
        self.term = self.term or "TERM" in words

    def _on_usr1(self, _number: int, _frame: FrameType | None) -> None:
        self.usr1 = True

    def _on_term(self, _number: int, _frame: FrameType | None) -> None:
        self.term = True


def exit_code(usr1: bool, term: bool) -> int:
    """TERM wins: whoever sent it decides what comes next, so nothing may restart the run by itself."""
    assert usr1 or term
    return EXIT_SAVED_ON_TERM if term else EXIT_SAVED_ON_USR1
