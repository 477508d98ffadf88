"""The judge of ``make chaos`` finds every kind of loss."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path

import pytest

from alignkd.run_folder.paths import RunPaths
from tests.chaos import accidents
from tests.chaos.__main__ import judge
from tests.chaos.accidents import contents
from tests.chaos.oracle import Left, differing_rows, look
from tests.chaos.plan import ACCIDENTS, DISTURBED, START, TRAINING, UNMOUNTED, kills
from tests.chaos.report import Report
from tests.checkpoint.faulty_storage import PHASES, VICTIMS


def write_rows(run: Path, *rows: dict) -> Path:
    run.mkdir()
    RunPaths(run).metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_rows_that_differ_only_in_times_are_equal(tmp_path: Path) -> None:
    whole = write_rows(
        tmp_path / "whole", *({"step": n, "loss": 1.0, "step_seconds": 0.1} for n in (1, 2, 3))
    )
    same = write_rows(tmp_path / "same", *({"step": n, "loss": 1.0, "step_seconds": 0.7} for n in (1, 2, 3)))
    assert differing_rows(same, whole) == []
    other = write_rows(tmp_path / "other", *({"step": n, "loss": n / 2, "step_seconds": 0.1} for n in (1, 2)))
    assert differing_rows(other, whole) == [1, 3]
    twice = write_rows(
        tmp_path / "twice", *({"step": n, "loss": 1.0, "step_seconds": 0.1} for n in (1, 2, 2, 3))
    )
    assert differing_rows(twice, whole) == [2, 3]


def test_what_a_start_did_is_read_from_its_files(tmp_path: Path) -> None:
    run = write_rows(tmp_path / "run", *({"step": n} for n in range(1, 8)))
    (run / "checkpoints" / "step-6").mkdir(parents=True)
    (run / "checkpoints" / "step-6" / "COMMITTED").touch()
    RunPaths(run).logs.mkdir()
    before = "x resumed at step 2\nx saved step-6: 1 MB\n"
    (run / "logs" / "rank-0.log").write_text(before + "x resumed at step 4\n")
    RunPaths(run).progress.write_text('{"phase": "training", "step": 8}')
    assert look(run, len(before)) == Left(4, True, promised=6, committed=6, computed=8, passed_over=())
    RunPaths(run).progress.unlink()
    assert look(run, len(before) + 20) == Left(
        None, False, promised=6, committed=6, computed=6, passed_over=()
    )


def test_the_judge_reports_every_wrong_outcome() -> None:
    had = Left(0, True, promised=6, committed=6, computed=7, passed_over=())
    good, report = Left(6, True, 8, 8, 9, ()), Report()
    judge(report, had, good, "")
    assert report.ok
    for bad in (
        Left(4, True, 8, 8, 9, ()),  # resumed from an older one
        Left(0, True, 8, 8, 9, ()),  # from the beginning
        Left(6, True, 10, 8, 11, ()),  # said that 10 is saved
        Left(None, False, 6, 4, 4, ()),  # 6 is gone
        Left(6, True, 8, 8, 9, ("step-8: has another sha256",)),
    ):
        report = Report()
        judge(report, had, bad, "")
        assert not report.ok, bad
    assert not Report(silent=["the start ended with 0"]).ok


def test_what_a_start_changes_is_seen(tmp_path: Path) -> None:
    run = write_rows(tmp_path / "run", {"step": 1})
    (run / "checkpoints" / "step-1").mkdir(parents=True)
    (run / "checkpoints" / "step-1" / "shard.pt").write_text("x")
    before = contents(run)
    (run / "progress.json").write_text("{}")
    assert contents(run) == before
    (run / "checkpoints" / "step-1" / "shard.pt").write_text("y")
    assert contents(run) != before
    (run / "checkpoints" / "step-1" / "shard.pt").write_text("x")
    RunPaths(run).metrics.write_text("")
    assert contents(run) != before


@pytest.mark.parametrize("status", ["done", "failed"])
def test_a_start_without_checkpoints_may_succeed_only_on_a_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    run = write_rows(tmp_path / "run", {"step": 1})
    RunPaths(run).checkpoints.mkdir()
    RunPaths(run).result.write_text(f'{{"status": "{status}"}}')
    monkeypatch.setattr(accidents, "alignkd", lambda *_: subprocess.Popen(["true"]))
    report = Report()
    accidents.between_starts(run, UNMOUNTED, 0.0, report, "here")
    assert (report.silent == []) == (status == "done")


def test_the_plan_pairs_every_phase_with_every_victim() -> None:
    planned = list(itertools.islice(kills(3), 3 * len(PHASES) * len(VICTIMS)))
    in_saves = [(kill.phase, kill.victim) for kill in planned if kill.in_save]
    assert sorted(in_saves) == sorted(itertools.product(PHASES, VICTIMS))
    assert {kill.phase for kill in planned} == {START, TRAINING, *PHASES, *DISTURBED, *ACCIDENTS}
    assert list(itertools.islice(kills(7), 20)) == list(itertools.islice(kills(7), 20))
