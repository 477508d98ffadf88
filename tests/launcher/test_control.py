"""Resuming a run that another job has. The real Slurm is in tests/slurm."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from alignkd.errors import UserError
from launcher import cli_runs, control
from launcher.attempts import OPEN, Attempt
from launcher.control import ResumeRequest, resume_run
from launcher.files import write_json
from launcher.manifest import read_manifest
from launcher.slurm import QueuedJob


@pytest.fixture
def run(make_run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """On Slurm, in the shell of allocation 8; ``start_run`` starts nothing and returns 0."""
    folder, manifest = make_run()
    write_json(folder / "manifest.json", {**manifest.as_dict(), "backend": "slurm"})
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    monkeypatch.setattr(control, "queued_jobs", lambda _run: [])
    monkeypatch.setattr(control, "is_running", lambda _job: True)
    monkeypatch.setattr(control, "start_run", lambda *_: (0, None))
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
    write_json(run / OPEN, asdict(Attempt(1, "7", "n1", 0.0, 0)))
    with pytest.raises(UserError, match="job 7 is training it"):
        resume_run(run, ResumeRequest(), Console(quiet=True))
    monkeypatch.setattr(control, "is_running", lambda _job: False)  # it left no word
    assert resume_run(run, ResumeRequest(), Console(quiet=True))["code"] == 0


@pytest.mark.parametrize(("job_runs", "state"), [(True, "running"), (False, "lost")])
def test_status_of_a_run_in_an_allocation(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], job_runs: bool, state: str
) -> None:
    write_json(run / OPEN, asdict(Attempt(1, "7", "n1", 0.0, 0)))
    monkeypatch.setattr(cli_runs, "queued_jobs", lambda _run: [])
    monkeypatch.setattr(cli_runs, "is_running", lambda _job: job_runs)
    cli_runs.status(run, as_json=True)
    assert json.loads(capsys.readouterr().out)["state"] == state


def test_an_attempt_that_was_killed_in_this_allocation_is_no_obstacle(run: Path) -> None:
    write_json(run / OPEN, asdict(Attempt(1, "8", "n1", 0.0, 0)))
    assert resume_run(run, ResumeRequest(), Console(quiet=True))["code"] == 0
