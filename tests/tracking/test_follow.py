"""Which rows a tracker gets, and what its failures cost."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest

from alignkd.run_folder.metrics import row_line
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.writer_lock import WriterLock, is_newest
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
    follow(run, "it", lambda state: (recorder, state.step if last is None else last), over, 0.0, lambda: True)


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

    follow(tmp_path, "it", no_key, threading.Event(), 60.0, lambda: True)
    assert [record.getMessage() for record in caplog.records] == [
        "warning: tracking.it is off for this attempt: No API key configured."
    ]


def test_the_trackers_of_a_frozen_rank_leave_a_run_that_another_attempt_has_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 0 of the first attempt is frozen, not its trackers' process: it sees the second one's rows."""
    run, note = tmp_path, lambda _: None
    first = WriterLock(run, note, beat_seconds=3600)
    write(run, 1, 2, 3)
    old, new = Recorder(), Recorder()
    with first:
        arguments = (run, "it", lambda _: (old, 0), threading.Event(), 0.01)
        thread = threading.Thread(target=follow, args=(*arguments, partial(is_newest, run, first.generation)))
        thread.start()
        while len(old.rows) < 3:
            assert thread.is_alive()
        with WriterLock(run, note, stale_seconds=0.0):
            write(run, 1, 2, 3, 4, 5)
            thread.join(60)
            assert not thread.is_alive()
            follow_to_the_end(run, new, last=2)
    assert (list(old.rows), list(new.rows)) == ([1, 2, 3], [3, 4, 5])
    assert [record.getMessage() for record in caplog.records] == [
        "warning: tracking.it ends: another process has taken over this run"
    ]


def test_the_trackers_of_a_run_whose_writer_has_ended_write_its_last_rows(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    with WriterLock(tmp_path, lambda _: None) as lock:
        pass
    recorder, over = Recorder(), threading.Event()
    over.set()
    follow(tmp_path, "it", lambda _: (recorder, 0), over, 0.0, partial(is_newest, tmp_path, lock.generation))
    assert list(recorder.rows) == [1, 2]
