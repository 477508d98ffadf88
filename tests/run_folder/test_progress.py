from __future__ import annotations

import errno
import json
import threading
import time
from pathlib import Path

import pytest

from alignkd.run_folder.progress import Progress, Snapshot, read_snapshot, saved_step


def test_a_long_phase_is_reported_again_and_again(tmp_path: Path) -> None:
    progress = Progress(tmp_path, writes=True, interval=0.0)
    with progress.alive("converting", every=0.02):
        seen = set()
        while len(seen) < 3:
            time.sleep(0.01)
            if (tmp_path / "progress.json").exists():
                values = json.loads((tmp_path / "progress.json").read_text())
                assert values["phase"] == "converting"
                seen.add(values["updated"])
    last = (tmp_path / "progress.json").read_text()
    time.sleep(0.1)
    assert (tmp_path / "progress.json").read_text() == last


def test_a_snapshot_is_read_from_what_the_ranks_wrote(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    assert read_snapshot(path, 0) is None
    path.write_text("{")
    assert read_snapshot(path, 0) is None
    values = {"phase": "training", "step": 3, "total_steps": 9, "loss": 1.5, "samples_per_second": 7}
    path.write_text(json.dumps({**values, "updated": 100.0, "data_wait_share": 0.5}))
    assert read_snapshot(path, 50) == Snapshot("training", 3, 9, 1.5, 7.0, 100.0, data_wait_share=0.5)
    assert read_snapshot(path, 101) is None, "left over from an earlier start"
    path.write_text(json.dumps({"phase": "loading", "total_steps": None, "loss": None, "updated": 1}))
    assert read_snapshot(path, 0) == Snapshot("loading", updated=1.0)
    path.write_text(json.dumps({"phase": "indexing", "done": 3, "total": 12, "updated": 1}))
    assert read_snapshot(path, 0) == Snapshot("indexing", updated=1.0, done=0.25)


def test_what_the_writer_reports_is_what_the_reader_gets(tmp_path: Path) -> None:
    path, start = tmp_path / "progress.json", time.time()
    Progress(tmp_path, writes=False).report("training", step=1)
    assert read_snapshot(path) is None
    progress = Progress(tmp_path, writes=True, interval=60.0)
    progress.report("training", step=2, total_steps=9, loss=1.5)
    progress.report("training", step=3, total_steps=9, loss=1.25)  # too soon to be written
    snapshot = read_snapshot(path, since=start)
    assert snapshot is not None
    assert (snapshot.phase, snapshot.step, snapshot.total_steps, snapshot.loss) == ("training", 2, 9, 1.5)
    progress.report("saving", step=3, total_steps=9)  # a new phase never waits
    snapshot = read_snapshot(path)
    assert snapshot is not None
    assert (snapshot.phase, snapshot.step) == ("saving", 3)


def test_a_start_takes_over_which_step_was_saved(tmp_path: Path) -> None:
    progress = Progress(tmp_path, writes=True, interval=60.0)
    progress.report("starting")
    assert saved_step(tmp_path) is None
    progress.report("training", step=3, saved_step=2)
    progress.report("training", step=5, saved_step=4)  # too soon to be written
    progress.report("saving", step=5)
    assert saved_step(tmp_path) == 4
    Progress(tmp_path, writes=True).report("starting")
    assert saved_step(tmp_path) == 4
    (tmp_path / "progress.json").write_text("[]")
    assert saved_step(tmp_path) is None


def test_a_full_disk_does_not_end_a_run_that_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    Progress(tmp_path, writes=True).report("training", step=1)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_never_sees_a_part_of_a_report(tmp_path: Path) -> None:
    path, progress = tmp_path / "progress.json", Progress(tmp_path, writes=True, interval=0.0)
    progress.report("training", step=0)
    ended = threading.Event()

    def write() -> None:
        for step in range(300):
            progress.report("training", step=step, text="x" * 20_000)
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not ended.is_set():
        assert json.loads(path.read_text())["phase"] == "training"
    writer.join()
