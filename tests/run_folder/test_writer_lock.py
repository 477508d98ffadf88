from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkd.errors import UserError
from alignkd.run_folder import writer_lock
from alignkd.run_folder.writer_lock import STALE_SECONDS, WriterLock


def write(run: Path, generation: int = 1, **facts: object) -> Path:
    described = {"host": "elsewhere", "pid": 1, "job": None, "beat": "1.1"} | facts
    (run / "writers").mkdir(exist_ok=True)
    path = run / "writers" / f"{generation}.json"
    path.write_text(json.dumps(described))
    return path


def read(run: Path, generation: int = 1) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((run / "writers" / f"{generation}.json").read_text())
    return facts


def lock(run: Path, notes: list[str]) -> WriterLock:
    return WriterLock(run, notes.append, beat_seconds=0.05, stale_seconds=0.5)


class Clock:
    """Time passes only while somebody sleeps; ``events``: what else happens then, by the second."""

    def __init__(self, **events: Callable[[], object]) -> None:
        self.now = 0.0
        self._events = {int(second.removeprefix("after_")): event for second, event in events.items()}

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        before, self.now = self.now, self.now + seconds
        for second, event in self._events.items():
            if before < second <= self.now:
                event()


def timed(run: Path, clock: Clock, notes: list[str]) -> WriterLock:
    """With the real intervals. No beat of its own falls into a test."""
    return WriterLock(run, notes.append, clock=clock, sleep=clock.sleep)


def test_a_lock_beats_while_it_is_held_and_says_that_it_has_ended_afterwards(tmp_path: Path) -> None:
    notes: list[str] = []
    with lock(tmp_path, notes) as held:
        first = read(tmp_path)
        assert (first["host"], first["pid"], first["ended"]) == (socket.gethostname(), os.getpid(), False)
        threading.Event().wait(0.3)
        assert read(tmp_path)["beat"] != first["beat"]
        assert held.generation == 1
    assert read(tmp_path)["ended"] is True
    assert notes == []


def test_a_writer_that_has_ended_is_succeeded_at_once_by_the_next_generation(tmp_path: Path) -> None:
    notes: list[str] = []
    for generation in (1, 2, 3):
        with timed(tmp_path, Clock(), notes) as held:
            assert held.generation == generation
        assert os.listdir(tmp_path / "writers") == [f"{generation}.json"]
    assert notes == []


def test_a_beat_does_not_wait_for_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("a writer that waits here looks dead"))
    notes: list[str] = []
    with lock(tmp_path, notes) as held:
        threading.Event().wait(0.2)
        assert held.is_held()
    assert notes == []


def test_a_living_writer_keeps_its_lock_and_the_second_one_is_refused(tmp_path: Path) -> None:
    with lock(tmp_path, []) as held:
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), lock(tmp_path, []):
            pass
        assert held.is_held()
        assert os.listdir(tmp_path / "writers") == ["1.json"]


def test_of_two_that_start_at_the_same_moment_one_is_refused(tmp_path: Path) -> None:
    """Both have seen that there is no writer when the first one claims the run."""
    second = lock(tmp_path, [])
    seen, newest = [], second._newest

    def claimed_in_between() -> int:
        seen.append(newest())
        if len(seen) == 1:
            first.__enter__()
        return seen[-1]

    second._newest = claimed_in_between  # type: ignore[method-assign]
    first = lock(tmp_path, [])
    try:
        with pytest.raises(UserError, match="is writing this run"):
            second.__enter__()
        assert seen == [0, 1]
        assert first.is_held()
    finally:
        first.__exit__(None, None, None)


def test_a_writer_that_has_lost_its_lock_knows(tmp_path: Path) -> None:
    clock, notes = Clock(), []
    with timed(tmp_path, clock, notes) as held:
        assert held.is_held()
        (tmp_path / "writers" / "1.json").write_text("{")  # being replaced, or a sick file system
        assert held.is_held()
        write(tmp_path, 2, host="elsewhere", pid=os.getpid())
        assert not held.is_held()
        assert not held.beat()
        assert "another process has taken over this run" in notes[-1]
        (tmp_path / "writers" / "2.json").unlink()
        assert held.is_held()
        (tmp_path / "writers" / "1.json").unlink()  # by the one that takes over
        assert not held.is_held()
        assert not held.beat()
        assert os.listdir(tmp_path / "writers") == []


def test_a_takeover_outlasts_its_writer(tmp_path: Path) -> None:
    """The other one has come and gone."""
    with timed(tmp_path, Clock(), []) as hung:
        forget_process(tmp_path, 1)
        with timed(tmp_path, Clock(), []) as other:
            assert other.generation == 2
        assert not hung.is_held()
        assert not hung.beat()
    assert read(tmp_path, 2)["ended"] is True


def forget_process(run: Path, generation: int) -> None:
    """As seen from another host, where the process table of this one says nothing."""
    path = run / "writers" / f"{generation}.json"
    path.write_text(json.dumps(read(run, generation) | {"host": "elsewhere"}))


def test_a_late_beat_of_a_process_taken_for_dead_does_not_win_the_run_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its write hangs in a network file system until another process writes the run."""
    write_now = writer_lock.write_text_atomic
    hung, landed = threading.Event(), threading.Event()

    def write_late(path: Path, text: str, **options: Any) -> None:
        if threading.current_thread().name == "hung":
            hung.set()
            assert landed.wait(60)
        path.parent.mkdir(exist_ok=True)
        write_now(path, text, **options)

    monkeypatch.setattr(writer_lock, "write_text_atomic", write_late)
    notes: list[str] = []
    old, new = timed(tmp_path, Clock(), notes), timed(tmp_path, Clock(), [])
    answers: list[bool] = []
    with old:
        forget_process(tmp_path, 1)
        thread = threading.Thread(target=lambda: answers.append(old.beat()), name="hung")
        thread.start()
        assert hung.wait(60)
        with new:
            landed.set()
            thread.join()
            assert answers == [False]
            assert "another process has taken over this run" in notes[-1]
            assert not old.is_held()
            assert new.is_held()
            assert new.beat()
    assert read(tmp_path, 2)["ended"] is True
    assert not old.is_held()


def test_a_lock_that_cannot_be_read_for_a_moment_is_still_held(tmp_path: Path) -> None:
    """The file system fails between two looks; afterwards the lock beats on."""
    path = tmp_path / "writers" / "1.json"
    failing = threading.Event()

    class Sick(WriterLock):
        def _read(self, generation: int) -> dict[str, Any] | None:
            return {} if failing.is_set() else super()._read(generation)

        def _generations(self) -> list[int]:
            if failing.is_set():
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super()._generations()

    notes: list[str] = []
    with Sick(tmp_path, notes.append, beat_seconds=0.05) as held:
        failing.set()
        assert held.is_held()
        threading.Event().wait(0.3)  # some beats
        failing.clear()
        before = path.read_text()
        deadline = time.monotonic() + 60
        while path.read_text() == before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert path.read_text() != before
        assert held.is_held()
    assert notes == []


def test_a_silent_writer_on_another_host_is_taken_over_with_a_note(tmp_path: Path) -> None:
    notes: list[str] = []
    write(tmp_path, job="77")
    clock = Clock()
    with timed(tmp_path, clock, notes):
        assert read(tmp_path, 2)["pid"] == os.getpid()
    assert clock.now >= STALE_SECONDS
    assert "took over the run from process 1 on elsewhere (job 77)" in notes[-1]


def test_a_writer_whose_beat_comes_late_is_alive(tmp_path: Path) -> None:
    write(tmp_path)
    clock = Clock(after_40=lambda: write(tmp_path, beat="1.2"))
    with pytest.raises(UserError, match="process 1 on elsewhere is writing this run"):
        timed(tmp_path, clock, []).__enter__()
    assert 40 <= clock.now < STALE_SECONDS


def test_a_writer_that_ends_while_it_is_watched_is_succeeded(tmp_path: Path) -> None:
    write(tmp_path)
    clock = Clock(after_5=lambda: write(tmp_path, beat="1.2", ended=True))
    with timed(tmp_path, clock, []) as held:
        assert held.generation == 2
    assert 5 <= clock.now < 10


def test_a_full_disk_at_the_start_leaves_no_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(writer_lock, "write_text_atomic", full)
        with pytest.raises(OSError, match="No space left"):
            lock(tmp_path, []).__enter__()
    clock = Clock()
    with timed(tmp_path, clock, []):
        assert clock.now == 0


def test_a_dead_writer_on_this_host_is_taken_over_at_once(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    notes: list[str] = []
    write(tmp_path, host=socket.gethostname(), pid=dead.pid)
    with WriterLock(tmp_path, notes.append, stale_seconds=3600):
        assert len(notes) == 1


def test_a_requeued_job_takes_over_from_itself_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    write(tmp_path, job="12")
    with WriterLock(tmp_path, [].append, stale_seconds=3600):
        pass


@pytest.mark.parametrize("content", ["", "{", "[1]", '"x"'])
def test_a_damaged_lock_is_waited_for_and_taken_over(tmp_path: Path, content: str) -> None:
    write(tmp_path).write_text(content)
    with lock(tmp_path, []):
        assert read(tmp_path, 2)["pid"] == os.getpid()
