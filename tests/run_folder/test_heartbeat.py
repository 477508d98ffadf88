from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkd.run_folder.heartbeat import Beat, Heartbeat, beat_seconds, read_beat
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.progress import Progress


def beat(run: Path, condition: Callable[[Beat], bool]) -> Beat:
    """The first one that fulfils the condition."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        found = read_beat(run, 1)
        if found is not None and condition(found):
            return found
        time.sleep(0.01)
    raise AssertionError(f"the last beat was {read_beat(run, 1)}")


def test_a_beat_says_what_a_rank_does(tmp_path: Path) -> None:
    assert read_beat(tmp_path, 1) is None
    with Heartbeat(tmp_path, 1, interval=0.02) as heartbeat:
        progress = Progress(tmp_path, writes=False, heartbeat=heartbeat)
        progress.report("indexing", done=3, total=9)
        assert beat(tmp_path, lambda seen: seen.phase == "indexing").done == 3
        progress.enter("training", 7)
        progress.end_step(8, None)
        for seconds in (1.0, 5.0, 1.0):
            progress.end_step(8, (seconds, seconds / 4))
        seen = beat(tmp_path, lambda seen: seen.steps == 4)
        assert (seen.phase, seen.step, seen.done) == ("training", 8, None)
        assert (seen.step_seconds, seen.own_seconds) == (1.0, 0.25)  # medians
        progress.report("saving", step=8)
    last = read_beat(tmp_path, 1)
    assert last is not None
    assert (last.phase, last.step) == ("ended", 8)


def test_a_rank_that_does_the_same_beats_and_does_not_move(tmp_path: Path) -> None:
    with Heartbeat(tmp_path, 1, interval=0.02) as heartbeat:
        heartbeat.enter("converting")
        first = beat(tmp_path, lambda seen: seen.phase == "converting")
        heartbeat.enter("converting")
        later = beat(tmp_path, lambda seen: seen.count > first.count + 2)
        assert later.moves == first.moves
        heartbeat.enter("saving")
        assert beat(tmp_path, lambda seen: seen.phase == "saving").moves == first.moves + 1


def test_a_phase_outside_steps_is_written_at_once(tmp_path: Path) -> None:
    with Heartbeat(tmp_path, 1, interval=3600.0) as heartbeat:
        heartbeat.enter("joining")
        beat(tmp_path, lambda seen: seen.phase == "joining")
        heartbeat.enter("training", 3)  # comes with the next beat
        heartbeat.enter("saving", 3)
        beat(tmp_path, lambda seen: seen.phase == "saving")


def test_a_folder_that_cannot_be_written_does_not_end_a_rank(tmp_path: Path) -> None:
    (tmp_path / "beats").write_text("a file")
    with Heartbeat(tmp_path, 1, interval=0.01) as heartbeat:
        heartbeat.enter("training", 1)
        time.sleep(0.1)
    assert (tmp_path / "beats").read_text() == "a file"


def test_a_damaged_beat_is_none(tmp_path: Path) -> None:
    path = RunPaths(tmp_path).beat(1)
    path.parent.mkdir()
    for text in ("", '{"phase": "tr', "[1]", "3"):
        path.write_text(text)
        assert read_beat(tmp_path, 1) is None
    path.write_text('{"phase": "training", "later": 1}' + " " * 9)
    assert read_beat(tmp_path, 1) == Beat("training")


@pytest.mark.parametrize(("hang_seconds", "expected"), [(0, 10.0), (600, 10.0), (20, 1.0), (1, 0.25)])
def test_beats_are_more_frequent_where_hangs_are_to_be_noticed_soon(
    hang_seconds: float, expected: float
) -> None:
    assert beat_seconds(hang_seconds) == expected
