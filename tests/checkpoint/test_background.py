"""The thread that writes a rank's files."""

from __future__ import annotations

import errno
import os
import signal
import threading

import pytest

from alignkd.checkpoint.background import BackgroundWrite


def test_the_files_are_the_result() -> None:
    files = {"a.pt": {"bytes": 3, "sha256": "x"}}
    write = BackgroundWrite(lambda: files)
    assert write.result(60) == (files, None)
    assert write.done


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (ValueError("a bug"), "ValueError: a bug"),
    ],
)
def test_what_goes_wrong_in_the_thread_is_the_result(error: Exception, shown: str) -> None:
    def fails() -> dict:
        raise error

    files, problem = BackgroundWrite(fails).result(60)
    assert files == {}
    assert problem is not None
    assert shown in problem


def test_a_write_that_hangs_has_failed() -> None:
    over = threading.Event()

    def hang() -> dict:
        over.wait(60)
        return {"a.pt": {"bytes": 3, "sha256": "x"}}

    write = BackgroundWrite(hang)
    files, problem = write.result(0.2)
    assert files == {}
    assert problem is not None
    assert "not written within 0 s" in problem
    assert not write.done
    over.set()


def test_a_write_is_done_when_its_thread_has_ended_and_the_main_thread_does_not_wait() -> None:
    over = threading.Event()
    write = BackgroundWrite(lambda: over.wait() and {})
    write.wait(0.01)
    assert not write.done
    over.set()
    assert write.result(60) == ({}, None)
    assert write.done


def test_stop_signals_do_not_reach_the_thread() -> None:
    blocked: set[int] = set()
    BackgroundWrite(lambda: blocked.update(signal.pthread_sigmask(signal.SIG_BLOCK, ())) or {}).result(60)
    assert {signal.SIGUSR1, signal.SIGTERM, signal.SIGINT} <= blocked
    assert signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, ()), os.getpid()
