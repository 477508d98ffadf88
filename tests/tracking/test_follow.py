"""Which rows a tracker gets, and what its failures cost."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from alignkd.run_folder.metrics import row_line
from alignkd.run_folder.paths import RunPaths
from alignkd.tracking.follow import TrackerState, follow


class Recorder:
    """Refuses rows from ``fails_at`` on, as a full disk does."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.rows: dict[int, Mapping[str, float]] = {}
        self.closed = False

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self.fails_at is not None and step >= self.fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert step not in self.rows
        self.rows[step] = values

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed = True


def write(run: Path, *steps: int) -> None:
    rows = [{"step": step, "loss": 0.5, "evaluation_loss": 2, "word": "x", "none": None} for step in steps]
    RunPaths(run).metrics.write_text("".join(map(row_line, rows)) + '{"step": 9, "lo')


def follow_to_the_end(run: Path, recorder: Recorder, last: int | None = None) -> None:
    over = threading.Event()
    over.set()
    follow(run, "it", lambda state: (recorder, state.step if last is None else last), over, 0.0)


def test_a_tracker_gets_the_numbers_of_each_row_after_its_last_one(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    first, second = Recorder(), Recorder()
    follow_to_the_end(tmp_path, first)
    assert list(first.rows) == [1, 2]
    assert all(values == {"train/loss": 0.5, "evaluation/loss": 2.0} for values in first.rows.values())
    assert first.closed
    write(tmp_path, 1, 2, 3)
    follow_to_the_end(tmp_path, second)
    assert list(second.rows) == [3]
    assert TrackerState(tmp_path, "it").step == 3


def test_a_tracker_that_fails_is_given_up_with_one_warning_and_continues_in_the_next_attempt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1)
    follow_to_the_end(tmp_path, Recorder())
    write(tmp_path, 1, 2, 3)
    follow_to_the_end(tmp_path, Recorder(fails_at=2))
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning == "warning: tracking.it is off for this attempt: [Errno 28] No space left on device"
    again = Recorder()
    follow_to_the_end(tmp_path, again)
    assert list(again.rows) == [2, 3]


def test_a_tracker_that_cannot_be_opened_raises_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def no_key(_state: TrackerState) -> tuple[Recorder, int]:
        raise SystemExit("No API key configured.\nmore")

    follow(tmp_path, "it", no_key, threading.Event(), 60.0)
    assert [record.getMessage() for record in caplog.records] == [
        "warning: tracking.it is off for this attempt: No API key configured."
    ]
