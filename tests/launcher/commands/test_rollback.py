"""`alignkd resume --step N`: never under a living run, and undone when the start comes to nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from alignkd.errors import UserError
from alignkd.run_folder.checkpoints import committed_steps
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.writer_lock import WriterLock
from launcher.backends.base import Started
from launcher.backends.slurm import backend as slurm
from launcher.commands.resume import ResumeRequest, resume_run
from launcher.run import lock as run_lock
from launcher.run import rollback
from launcher.run.checkpoints import check_step
from launcher.run.rollback import rollback_to
from tests.launcher.run.test_checkpoints import checkpoint


@pytest.fixture
def run(slurm_run: Path) -> Path:
    """It is done, and has three checkpoints."""
    for step in (10, 20, 30):
        checkpoint(slurm_run, step)
    (slurm_run / "result.json").write_text("{}")
    write_rows(slurm_run, 30)
    return slurm_run


def write_rows(run: Path, count: int) -> None:
    rows = "".join(json.dumps({"step": step}) + "\n" for step in range(1, count + 1))
    RunPaths(run).metrics.write_text(rows)


def names(run: Path) -> set[str]:
    return {path.name for path in RunPaths(run).checkpoints.iterdir()}


def roll_back(run: Path) -> int:
    code: int = resume_run(run, ResumeRequest(step=10), Console(quiet=True))["code"]
    return code


def test_a_rollback_sets_newer_checkpoints_aside(run: Path) -> None:
    checkpoint(run, 30, suffix=".universal")
    check_step(run, 10)
    with rollback_to(run, 10, print) as done:
        assert done.set_aside == ["step-30.set-aside", "step-20.set-aside"]
    assert committed_steps(run) == [10]
    assert not (run / "result.json").exists()
    checkpoint(run, 20)
    with rollback_to(run, 10, print) as done:
        assert done.set_aside == ["step-20.set-aside-2"]
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"step-10", "step-20.set-aside", "step-20.set-aside-2", "step-30.set-aside"}


def test_without_file_locks_a_living_run_is_not_rolled_back(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    monkeypatch.setattr(slurm.SlurmBackend, "start", lambda *_: pytest.fail("it was started"))
    RunPaths(run).stop.write_text("USR1")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    with WriterLock(run, print, beat_seconds=0.05) as living:
        with pytest.raises(UserError, match="is writing this run; stop it first"):
            roll_back(run)
        assert living.is_held()
    assert {path: path.read_bytes() for path in before} == before
    assert names(run) == {"step-10", "step-20", "step-30"}


def test_the_writer_lock_is_held_while_checkpoints_are_renamed_and_let_go_before_the_start(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, bool]] = []
    set_aside = rollback._set_aside

    def note_lock(event: str) -> None:
        (path,) = RunPaths(run).writers.iterdir()
        events.append((event, not json.loads(path.read_text())["ended"]))

    def renaming(*arguments: object) -> None:
        note_lock("rename")
        set_aside(*arguments)  # type: ignore[arg-type]

    def start(*_: object) -> Started:
        note_lock("start")
        return Started(0, None)

    monkeypatch.setattr(rollback, "_set_aside", renaming)
    monkeypatch.setattr(slurm.SlurmBackend, "start", start)
    assert roll_back(run) == 0
    assert events == [("rename", True), ("start", False)]


@pytest.mark.parametrize("code", [1, 2, 137])
def test_a_start_that_fails_by_its_code_undoes_the_rollback(
    run: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_: object) -> Started:
        assert names(run) == {"step-10", "step-20.set-aside", "step-30.set-aside"}
        assert not (run / "result.json").exists()
        return Started(code, None)

    monkeypatch.setattr(slurm.SlurmBackend, "start", fail)
    assert roll_back(run) == code
    assert names(run) == {"step-10", "step-20", "step-30"}
    assert (run / "result.json").read_text() == "{}"


@pytest.mark.parametrize("done", ["saved", "cut its rows", "was stopped"])
def test_a_start_that_has_begun_to_train_keeps_the_rollback_however_it_ends(
    run: Path, monkeypatch: pytest.MonkeyPatch, done: str
) -> None:
    """Otherwise the next start would resume from a course that the metrics rows no longer belong to."""

    def train(*_: object) -> Started:
        if done == "saved":
            checkpoint(run, 15)
        if done == "cut its rows":
            write_rows(run, 10)
        return Started(85 if done == "was stopped" else 1, None)

    monkeypatch.setattr(slurm.SlurmBackend, "start", train)
    roll_back(run)
    assert {"step-20.set-aside", "step-30.set-aside"} <= names(run)
    assert committed_steps(run) == ([15, 10] if done == "saved" else [10])
    assert not (run / "result.json").exists()


def test_a_rollback_is_not_undone_under_a_run_that_lives_on(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its launcher has lost it, with a code of failure, before the first step."""
    living = WriterLock(run, print, beat_seconds=0.05)

    def start(*_: object) -> Started:
        living.__enter__()
        return Started(1, None)

    monkeypatch.setattr(slurm.SlurmBackend, "start", start)
    try:
        assert roll_back(run) == 1
        assert living.is_held()
        assert names(run) == {"step-10", "step-20.set-aside", "step-30.set-aside"}
    finally:
        living.__exit__(None, None, None)


def test_a_rename_that_fails_halfway_is_undone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name == "step-20":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    monkeypatch.setattr(slurm.SlurmBackend, "start", lambda *_: pytest.fail("it was started"))
    with pytest.raises(OSError, match="Input/output"):
        roll_back(run)
    assert names(run) == {"step-10", "step-20", "step-30"}
    assert (run / "result.json").read_text() == "{}"
