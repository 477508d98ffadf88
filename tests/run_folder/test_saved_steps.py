from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.saved_steps import give_up_text, missing_checkpoints, recorded_save
from tests import tiny


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A save every 10 steps; the third failure in a row ends it. Nothing has been recorded."""
    return tiny.write_run(tmp_path / "run", 1, checkpoint__every=10, checkpoint__max_failures=3)


def write_attempts(run: Path, *saved: int) -> None:
    lines = [
        json.dumps({"number": number, "first_step": 0, "saved_step": step})
        for number, step in enumerate(saved, 1)
    ]
    RunPaths(run).attempts.write_text("\n".join(lines) + '\n{"torn')


def write_rows(run: Path, last: int) -> None:
    rows = [json.dumps({"step": step}) for step in range(1, last + 1)]
    RunPaths(run).metrics.write_text("\n".join(rows) + "\n")


def test_a_run_that_never_saved_starts_at_step_0(run: Path) -> None:
    assert (recorded_save(run), missing_checkpoints(run)) == (None, None)
    write_attempts(run, 0, 0)
    write_rows(run, 19)  # killed while the first save was being written, and before
    RunPaths(run).progress.write_text('{"phase": "training", "step": 19, "saved_step": 0}')
    assert (recorded_save(run), missing_checkpoints(run)) == (None, None)


def attempts_know(run: Path) -> None:
    write_attempts(run, 20, 0)


def the_open_attempt_knows(run: Path) -> None:
    RunPaths(run).open_attempt.write_text('{"number": 2, "first_step": 20}')


def progress_knows(run: Path) -> None:
    RunPaths(run).progress.write_text('{"phase": "loading", "saved_step": 20}')


def metrics_know(run: Path) -> None:
    write_rows(run, 59)  # were 30, 40 and 50 not saved either, the run would have ended


@pytest.mark.parametrize("know", [attempts_know, the_open_attempt_knows, progress_knows, metrics_know])
def test_each_record_of_a_save_is_found(run: Path, know) -> None:
    know(run)
    found = recorded_save(run)
    assert found is not None
    assert found.step == 20
    message = missing_checkpoints(run) or ""
    assert str(RunPaths(run).checkpoints) in message
    assert "step 20" in message
    assert f"alignkd resume {run} --from-scratch" in message


def test_rows_that_failed_saves_explain_are_no_record_of_a_save(run: Path) -> None:
    write_rows(run, 40)
    assert recorded_save(run) is None
    write_rows(run, 41)
    assert recorded_save(run) is not None


def test_a_visible_checkpoint_is_enough(run: Path) -> None:
    write_attempts(run, 20)
    folder = RunPaths(run).checkpoints / "step-10"
    folder.mkdir(parents=True)
    assert missing_checkpoints(run) is not None
    (folder / "COMMITTED").touch()
    assert missing_checkpoints(run) is None


def test_whole_folders_without_a_marker_are_named_with_what_restores_them(run: Path) -> None:
    write_attempts(run, 20)
    for name, text in (("step-10", '{"files": {}}'), ("step-20", '{"files": {}}'), ("step-30", "{")):
        (RunPaths(run).checkpoints / name).mkdir(parents=True)
        (RunPaths(run).checkpoints / name / "manifest.json").write_text(text)
    message = missing_checkpoints(run) or ""
    assert "step-20, step-10: only the marker is missing" in message
    assert f"touch {RunPaths(run).checkpoints}/step-20/COMMITTED" in message


def test_saves_that_were_given_up_are_no_record(run: Path) -> None:
    write_attempts(run, 20, 0)
    RunPaths(run).from_scratch.write_text(give_up_text(2))
    assert recorded_save(run) is None
    write_attempts(run, 20, 0, 10)
    found = recorded_save(run)
    assert found is not None
    assert (found.step, "attempt 3" in found.source) == (10, True)
