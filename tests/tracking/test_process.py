"""The process of the trackers, as rank 0 sees it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alignkd.config.live_sections import TrackingSection
from alignkd.errors import EXIT_SAVED_ON_USR1
from alignkd.tracking import process
from alignkd.tracking.process import SIGNALS, train_tracked

ON = TrackingSection(tensorboard=True)


class Trackers:
    """Stands for a process that takes ``seconds`` for its last rows and ends with ``returncode``."""

    def __init__(self, seconds: float, returncode: int) -> None:
        self.seconds, self.returncode = seconds, returncode
        self.killed = False
        self.blocked: set[Any] = set()

    def start(self, command: list[str], **_: object) -> Trackers:
        start = [sys.executable, "-m", "alignkd.tracking", "run"]
        assert command == [*start, "--resumed", "4", "--generation", "2"]
        self.blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        return self

    def communicate(self, timeout: float) -> None:
        if self.seconds > timeout:
            raise subprocess.TimeoutExpired("trackers", timeout)

    def kill(self) -> None:
        self.killed = True


@pytest.mark.parametrize(
    ("seconds", "returncode", "code", "killed", "warning"),
    [
        (30.0, 0, 0, False, ""),
        (30.0, 0, EXIT_SAVED_ON_USR1, True, "did not end within 5 s"),
        (4.0, 0, EXIT_SAVED_ON_USR1, False, ""),
        (0.0, -9, 0, False, "has ended with code -9"),
    ],
)
def test_trackers_get_time_at_the_end_but_little_after_a_stop_and_their_death_is_told(
    seconds: float,
    returncode: int,
    code: int,
    killed: bool,
    warning: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trackers = Trackers(seconds, returncode)
    monkeypatch.setattr(subprocess, "Popen", trackers.start)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert train_tracked(lambda: code, Path("run"), ON, 4, 2) == code
    assert trackers.killed is killed
    assert len(caplog.records) == bool(warning)
    assert warning in caplog.text
    # A signal that comes before the process ignores them would end it.
    assert trackers.blocked >= set(SIGNALS)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_a_run_without_trackers_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_start", lambda *_: pytest.fail("started"))
    assert train_tracked(lambda: 7, Path("run"), TrackingSection(), 0, 1) == 7


def test_a_process_that_cannot_be_started_costs_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(subprocess, "Popen", no_memory)
    assert train_tracked(lambda: 0, Path("run"), ON, 0, 1) == 0
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning == "warning: no tracking in this attempt: [Errno 12] Cannot allocate memory"
