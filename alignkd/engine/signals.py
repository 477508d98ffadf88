"""Stop signals as flags. Imported before torch: otherwise a USR1 during its import would kill the rank."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

from alignkd.errors import EXIT_SAVED_ON_TERM, EXIT_SAVED_ON_USR1


class StopRequest:
    """Which stop signals this process has received. The handlers only set flags; the ranks reduce them before
    the next step."""

    def __init__(self) -> None:
        self.usr1 = False
        self.term = False

    def install(self) -> None:
        signal.signal(signal.SIGUSR1, self._on_usr1)
        signal.signal(signal.SIGTERM, self._on_term)
        for number in (signal.SIGUSR1, signal.SIGTERM):
            # System calls in C++ code (a write, a socket) are restarted, not interrupted.
            signal.siginterrupt(number, False)

    def read(self, path: Path) -> None:
        """Read the file that `alignkd stop` and `cancel` write before they send a signal: a rank that is only
        starting would miss the signal."""
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
    """TERM wins: its sender decides what comes next, so nothing may requeue the run automatically."""
    assert usr1 or term
    return EXIT_SAVED_ON_TERM if term else EXIT_SAVED_ON_USR1
