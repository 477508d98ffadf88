from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.saved_steps import missing_checkpoints
from launcher.run.from_scratch import saves_given_up
from tests import tiny


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Its records know of saves, and it has no checkpoint."""
    run = tiny.write_run(tmp_path / "run", 1)
    attempt = {"number": 3, "job": "local", "nodes": "a", "start": 1.0, "first_step": 0, "saved_step": 4}
    RunPaths(run).attempts.write_text(json.dumps(attempt) + "\n")
    RunPaths(run).open_attempt.write_text(json.dumps({**attempt, "number": 4, "saved_step": None}))
    RunPaths(run).progress.write_text('{"phase": "training", "saved_step": 6}')
    RunPaths(run).metrics.write_text('{"step": 100}\n')
    return run


def state(run: Path) -> dict[Path, str]:
    return {path: path.read_text() for path in run.iterdir() if path.is_file()}


def test_a_run_whose_saves_were_given_up_starts_at_step_0(run: Path) -> None:
    assert missing_checkpoints(run) is not None
    with saves_given_up(run, True) as old_metrics:
        assert old_metrics == "metrics.jsonl.given-up"
        assert missing_checkpoints(run) is None
    assert missing_checkpoints(run) is None
    assert (run / "metrics.jsonl.given-up").read_text() == '{"step": 100}\n'
    RunPaths(run).metrics.write_text('{"step": 200}\n')
    with saves_given_up(run, True) as old_metrics:
        assert old_metrics == "metrics.jsonl.given-up-2"
    assert (run / "metrics.jsonl.given-up").read_text() == '{"step": 100}\n'


def test_a_start_that_is_refused_leaves_the_records_as_they_were(run: Path) -> None:
    before = state(run)
    with pytest.raises(RuntimeError), saves_given_up(run, True):
        raise RuntimeError
    assert state(run) == before


def test_a_start_that_failed_after_it_wrote_rows_keeps_them(run: Path) -> None:
    def start() -> None:
        RunPaths(run).metrics.write_text('{"step": 1}\n')
        raise RuntimeError

    with pytest.raises(RuntimeError), saves_given_up(run, True):
        start()
    assert RunPaths(run).metrics.read_text() == '{"step": 1}\n'
    assert missing_checkpoints(run) is None


def test_nothing_is_given_up_unasked(run: Path) -> None:
    before = state(run)
    with saves_given_up(run, False) as old_metrics:
        assert old_metrics is None
    assert state(run) == before
