"""Resuming and stopping runs that others have. The real Slurm is in tests/slurm."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from alignkd.errors import AlignkdError, UserError
from alignkd.run_folder.atomic_files import write_json
from alignkd.run_folder.checkpoints import committed_steps
from alignkd.run_folder.paths import RunPaths
from launcher.backends.slurm.client import QueuedJob
from launcher.cli import runs as cli_runs
from launcher.commands import control
from launcher.commands.control import ResumeRequest, resume_run
from launcher.run.attempts import Attempt, begin
from launcher.run.manifest import Manifest, read_manifest


@pytest.fixture
def run(make_run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """On Slurm, in the shell of allocation 8; ``_start`` starts nothing and returns 0."""
    folder, manifest = make_run()
    write_json(folder / "manifest.json", {**manifest.as_dict(), "backend": "slurm"})
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    monkeypatch.setattr(control, "queued_jobs", lambda _run: [])
    monkeypatch.setattr(control, "is_running", lambda _job: True)
    monkeypatch.setattr(control, "_start", lambda *_: (0, None))
    return folder


def test_ctrl_c_in_an_allocation_leaves_the_script_alive(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It belongs to srun: without the script nobody would write down how the ranks end."""
    monkeypatch.undo()
    monkeypatch.setattr(control, "in_allocation", lambda: True)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    (run / "job.sbatch").write_text("kill -INT $PPID\nsleep 0.5\nexit 7\n")
    assert control.start_run(run, read_manifest(run), Console(quiet=True)) == (7, None)


def test_a_job_in_the_queue_is_seen_from_an_allocation(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queued = [QueuedJob("7", "RUNNING", "None", None, str(run / "job.sbatch"))]
    monkeypatch.setattr(control, "queued_jobs", lambda _run: queued)
    before = (run / "manifest.json").read_text()
    with pytest.raises(UserError, match="job 7 is running already"):
        resume_run(run, ResumeRequest(nodes=2), Console(quiet=True))
    assert (run / "manifest.json").read_text() == before


def test_an_allocation_that_trains_the_run_is_seen(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(RunPaths(run).open_attempt, asdict(Attempt(1, "7", "n1", 0.0, 0)))
    with pytest.raises(UserError, match="job 7 is training it"):
        resume_run(run, ResumeRequest(), Console(quiet=True))
    monkeypatch.setattr(control, "is_running", lambda _job: False)  # it left no word
    assert resume_run(run, ResumeRequest(), Console(quiet=True))["code"] == 0


@pytest.mark.parametrize(("job_runs", "state"), [(True, "running"), (False, "lost")])
def test_status_of_a_run_in_an_allocation(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], job_runs: bool, state: str
) -> None:
    write_json(RunPaths(run).open_attempt, asdict(Attempt(1, "7", "n1", 0.0, 0)))
    monkeypatch.setattr(control, "is_running", lambda _job: job_runs)
    cli_runs.status(run, as_json=True)
    assert json.loads(capsys.readouterr().out)["state"] == state


def test_an_attempt_that_was_killed_in_this_allocation_is_no_obstacle(run: Path) -> None:
    write_json(RunPaths(run).open_attempt, asdict(Attempt(1, "8", "n1", 0.0, 0)))
    assert resume_run(run, ResumeRequest(), Console(quiet=True))["code"] == 0


def test_the_second_of_two_resumes_is_refused_before_it_changes_anything(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both were typed at once: the second comes while the first is about to rewrite the run's files."""
    seen: list[str] = []

    def fit(folder: Path, manifest: Manifest, *_: object) -> Manifest:
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(UserError, match="another launcher runs it"):
            resume_run(
                folder, ResumeRequest(allowed_changes=("training.learning_rate",)), Console(quiet=True)
            )
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        seen.append("refused")
        return manifest

    monkeypatch.setattr(control, "fit_run", fit)
    assert resume_run(run, ResumeRequest(), Console(quiet=True))["code"] == 0
    assert seen == ["refused"]


def checkpoint(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    (folder / "COMMITTED").touch()


def test_a_start_that_sbatch_refuses_leaves_the_run_as_it_was(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20, 30):
        checkpoint(run, step)
    write_json(run / "result.json", {"status": "done"})
    write_json(run / "allowed_changes.json", ["data.seed"])
    monkeypatch.setattr(control, "check_step", lambda *_: None)
    monkeypatch.setattr(control, "check_changes", lambda *_: None)
    request = ResumeRequest(step=10, allowed_changes=("training.learning_rate",))

    def refuse(*_: object) -> tuple[int, None]:
        assert committed_steps(run) == [10]  # it would have gone on from there
        assert "training.learning_rate" in (run / "allowed_changes.json").read_text()
        raise AlignkdError("sbatch refused it: no such account")

    def state() -> dict[str, bytes | None]:
        return {
            str(path): path.read_bytes() if path.is_file() else None
            for path in run.rglob("*")
            if path.name != ".lock"
        }

    before = state()
    monkeypatch.setattr(control, "_start", refuse)
    with pytest.raises(AlignkdError, match="no such account"):
        resume_run(run, request, Console(quiet=True))
    assert state() == before
    monkeypatch.setattr(control, "_start", lambda *_: (0, None))
    resume_run(run, request, Console(quiet=True))
    assert committed_steps(run) == [10]
    assert json.loads((run / "allowed_changes.json").read_text()) == ["data.seed", "training.learning_rate"]
    assert not (run / "result.json").exists()


@pytest.mark.parametrize(("state", "left"), [("RUNNING", True), ("PENDING", False)])
def test_a_cancel_is_written_down_before_scancel(
    run: Path, monkeypatch: pytest.MonkeyPatch, state: str, left: bool
) -> None:
    """Its script may be about to requeue the job, or to submit the next one: both find the file."""
    jobs = [QueuedJob("7", state, "None", None, str(run / "job.sbatch"))]
    following = QueuedJob("9", "PENDING", "Dependency", None, str(run / "job.sbatch"))
    cancelled: list[str] = []

    def cancel(job: str) -> None:
        assert RunPaths(run).stop.read_text() == "TERM 7\n"
        cancelled.append(job)

    def queued(_run: Path) -> list[QueuedJob]:
        return [*jobs, following] if RunPaths(run).stop.exists() else jobs

    monkeypatch.setattr(control, "queued_jobs", queued)
    monkeypatch.setattr(control, "cancel_job", cancel)
    assert control.cancel_run(run)["job"] == "7"
    assert cancelled == ["7", "9"]
    assert RunPaths(run).stop.exists() == left


@pytest.mark.parametrize(("state", "sent"), [("RUNNING", ["7"]), ("COMPLETING", []), ("CONFIGURING", [])])
def test_a_stop_of_a_job_that_is_being_requeued(
    run: Path, monkeypatch: pytest.MonkeyPatch, state: str, sent: list[str]
) -> None:
    """No rank runs then, and scancel cannot signal the job: the file alone tells the next start."""
    jobs = [QueuedJob("7", state, "None", None, str(run / "job.sbatch"))]
    signalled: list[str] = []
    monkeypatch.setattr(control, "queued_jobs", lambda _run: jobs)
    monkeypatch.setattr(control, "signal_ranks", lambda job, _name: signalled.append(job) is None)
    assert control.stop_run(run)["action"] == "asked to save and stop"
    assert signalled == sent
    assert RunPaths(run).stop.read_text() == "USR1 7\n"


@pytest.mark.parametrize(("command", "name"), [(control.stop_run, "USR1"), (control.cancel_run, "TERM")])
def test_only_the_ranks_of_an_allocation_are_signalled(
    run: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[[Path], object], name: str
) -> None:
    """The job is the user's shell. Until rank 0 has said which step the ranks are, the file must do."""
    sent: list[tuple[str, str]] = []
    monkeypatch.setattr(control, "signal_ranks", lambda *words: sent.append(words) is None)
    begin(run, "7", "n1", None)
    command(run)
    assert sent == []
    assert RunPaths(run).stop.read_text() == f"{name} 7\n"
    RunPaths(run).slurm_step.write_text("7.3\n")
    command(run)
    assert sent == [("7.3", name)]
