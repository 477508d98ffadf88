from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from alignkd.errors import UserError
from alignkd.run_folder.writer_lock import WriterLock


def write(run: Path, **facts: object) -> None:
    described = {"host": "elsewhere", "pid": 1, "job": None, "beat": "1.1"} | facts
    (run / "writer.json").write_text(json.dumps(described))


def lock(run: Path, notes: list[str]) -> WriterLock:
    return WriterLock(run, notes.append, beat_seconds=0.05, stale_seconds=0.5)


def test_a_lock_beats_while_it_is_held_and_is_removed_afterwards(tmp_path: Path) -> None:
    notes: list[str] = []
    with lock(tmp_path, notes):
        first = json.loads((tmp_path / "writer.json").read_text())
        assert (first["host"], first["pid"]) == (socket.gethostname(), os.getpid())
        threading.Event().wait(0.3)
        assert json.loads((tmp_path / "writer.json").read_text())["beat"] != first["beat"]
    assert not (tmp_path / "writer.json").exists()
    assert notes == []


def test_a_beat_does_not_wait_for_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("a writer that waits here looks dead"))
    notes: list[str] = []
    with lock(tmp_path, notes) as held:
        threading.Event().wait(0.2)
        assert held.is_held()
    assert notes == []


def test_a_living_writer_keeps_its_lock_and_the_second_one_is_refused(tmp_path: Path) -> None:
    with lock(tmp_path, []):
        held = json.loads((tmp_path / "writer.json").read_text())
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), lock(tmp_path, []):
            pass
        assert json.loads((tmp_path / "writer.json").read_text())["pid"] == held["pid"]


def test_a_writer_that_has_lost_its_lock_knows(tmp_path: Path) -> None:
    with lock(tmp_path, []) as held:
        assert held.is_held()
        (tmp_path / "writer.json").write_text("{")  # being replaced, or a sick file system
        assert held.is_held()
        write(tmp_path, host="elsewhere", pid=os.getpid())
        assert not held.is_held()
        (tmp_path / "writer.json").unlink()  # the other one has come and gone
        assert not held.is_held()


def test_a_lock_that_cannot_be_read_for_a_moment_is_still_held(tmp_path: Path) -> None:
    """The file system fails between two looks; afterwards the lock beats on."""
    path = tmp_path / "writer.json"
    failing = threading.Event()

    class Sick(WriterLock):
        def _read(self) -> dict[str, Any] | None:
            return {} if failing.is_set() else super()._read()

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
    with lock(tmp_path, notes):
        assert json.loads((tmp_path / "writer.json").read_text())["pid"] == os.getpid()
    assert "took over the run from process 1 on elsewhere (job 77)" in notes[-1]


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
    (tmp_path / "writer.json").write_text(content)
    with lock(tmp_path, []):
        assert json.loads((tmp_path / "writer.json").read_text())["pid"] == os.getpid()
