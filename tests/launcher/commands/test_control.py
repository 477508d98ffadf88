"""Starting, stopping and cancelling runs. tests/slurm does it on a real Slurm."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from alignkd.errors import AlignkdError, UserError
from alignkd.run_folder.atomic_files import write_json
from alignkd.run_folder.paths import RunPaths
from launcher.backends.base import QueuedJob
from launcher.backends.slurm import backend as slurm
from launcher.backends.slurm.client import jobs_of
from launcher.cli import runs as cli_runs
from launcher.commands import control
from launcher.commands.stages import link
from launcher.run.attempts import Attempt, begin
from launcher.run.lock import only_launcher
from launcher.run.manifest import read_manifest


def test_ctrl_c_in_an_allocation_does_not_kill_the_batch_script(
    slurm_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C is for srun. Without the script nothing would record how the ranks end."""
    run = slurm_run
    monkeypatch.undo()
    monkeypatch.setattr(slurm, "in_allocation", lambda: True)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    (run / "job.sbatch").write_text("kill -INT $PPID\nsleep 0.5\nexit 7\n")
    assert control.start_run(run, read_manifest(run), Console(quiet=True)) == (7, None)


@pytest.mark.parametrize(("job_runs", "state"), [(True, "running"), (False, "lost")])
def test_a_run_in_an_allocation_is_lost_when_the_allocation_is_gone(
    slurm_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    job_runs: bool,
    state: str,
) -> None:
    run = slurm_run
    write_json(RunPaths(run).open_attempt, asdict(Attempt(1, "7", "n1", 0.0, 0)))
    monkeypatch.setattr(slurm, "running_jobs", lambda jobs: set(jobs) if job_runs else set())
    cli_runs.status(run, as_json=True)
    assert json.loads(capsys.readouterr().out)["state"] == state


@pytest.mark.parametrize(("state", "left"), [("RUNNING", True), ("PENDING", False)])
def test_a_cancel_is_recorded_before_scancel(
    slurm_run: Path, monkeypatch: pytest.MonkeyPatch, state: str, left: bool
) -> None:
    """The script may be about to requeue the job or to submit the next one; both starts read the file."""
    run = slurm_run
    jobs = [QueuedJob("7", state, "None", None, str(run / "job.sbatch"))]
    following = QueuedJob("9", "PENDING", "Dependency", None, str(run / "job.sbatch"))
    cancelled: list[str] = []

    def cancel(job: str) -> None:
        assert RunPaths(run).stop.read_text() == "TERM 7\n"
        cancelled.append(job)

    def queued() -> list[QueuedJob]:
        return [*jobs, following] if RunPaths(run).stop.exists() else jobs

    monkeypatch.setattr(slurm, "own_jobs", queued)
    monkeypatch.setattr(slurm, "cancel_job", cancel)
    assert control.cancel_run(run)["job"] == "7"
    assert cancelled == ["7", "9"]
    assert RunPaths(run).stop.exists() == left


@pytest.mark.parametrize(
    ("state", "is_run", "taken"),
    [("PENDING", False, True), ("RUNNING", False, False), ("PENDING", True, False)],
)
def test_a_cancel_takes_the_waiting_evaluation_along_but_no_other_job(
    slurm_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, is_run: bool, taken: bool
) -> None:
    """An evaluation would wait for ever; a next stage is a run, which has a `cancel` of its own."""
    run, following = slurm_run, tmp_path / "it's next"
    following.mkdir()
    if is_run:
        (following / "manifest.json").touch()
    link(run, following)
    jobs = [
        QueuedJob("7", "RUNNING", "None", None, str(run / "job.sbatch")),
        QueuedJob("8", state, "Dependency", None, str(following / "job.sbatch")),
        QueuedJob("9", "PENDING", "None", None, "/elsewhere/job.sbatch"),
    ]
    cancelled: list[str] = []
    monkeypatch.setattr(slurm, "own_jobs", lambda: jobs)
    monkeypatch.setattr(slurm, "queued_jobs", lambda folder: jobs_of(folder, jobs))
    monkeypatch.setattr(slurm, "cancel_job", cancelled.append)
    done = control.cancel_run(run)
    assert cancelled == (["7", "8"] if taken else ["7"])
    later = (
        f", and its evaluation, job 8 (when the run is done: sbatch {shlex.quote(f'{following}/job.sbatch')})"
    )
    assert done == {"run": str(run), "job": "7", "action": f"cancelled{later}" if taken else "cancelled"}


def test_a_cancel_takes_the_waiting_evaluation_along_when_the_run_has_ended(
    slurm_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, following = slurm_run, tmp_path / "next"
    following.mkdir()
    link(run, following)
    job = QueuedJob("8", "PENDING", "DependencyNeverSatisfied", None, str(following / "job.sbatch"))
    queue = [job]
    monkeypatch.setattr(slurm, "own_jobs", lambda: queue)
    monkeypatch.setattr(slurm, "queued_jobs", lambda folder: jobs_of(folder, queue))
    monkeypatch.setattr(slurm, "cancel_job", lambda job: queue.pop().id == job)
    with pytest.raises(UserError, match="nothing to stop"):
        control.stop_run(run)
    later = f"(when the run is done: sbatch {following}/job.sbatch)"
    action = f"cancelled the evaluation of the run {later}"
    assert control.cancel_run(run) == {"run": str(run), "job": "8", "action": action}
    assert queue == []
    assert not RunPaths(run).stop.exists()  # the next start is not meant
    with pytest.raises(UserError, match="nothing to stop"):
        control.cancel_run(run)


@pytest.mark.parametrize("ended", [True, False])
def test_a_cancel_says_so_when_slurm_does_not_answer_about_the_evaluation(
    slurm_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    link(slurm_run, tmp_path)
    jobs = [] if ended else [QueuedJob("7", "RUNNING", "None", None, str(slurm_run / "job.sbatch"))]
    cancelled: list[str] = []
    monkeypatch.setattr(slurm, "own_jobs", lambda: jobs)
    monkeypatch.setattr(slurm, "queued_jobs", lambda _: None)
    monkeypatch.setattr(slurm, "cancel_job", cancelled.append)
    with pytest.raises(AlignkdError, match="does not answer, so its evaluation may still be queued"):
        control.cancel_run(slurm_run)
    assert cancelled == [job.id for job in jobs]


@pytest.mark.parametrize(("state", "sent"), [("RUNNING", ["7"]), ("COMPLETING", []), ("CONFIGURING", [])])
def test_a_job_that_is_being_requeued_is_stopped_by_the_file_alone(
    slurm_run: Path, monkeypatch: pytest.MonkeyPatch, state: str, sent: list[str]
) -> None:
    """No rank is running, and scancel cannot signal the job."""
    run = slurm_run
    jobs = [QueuedJob("7", state, "None", None, str(run / "job.sbatch"))]
    signalled: list[str] = []
    monkeypatch.setattr(slurm, "own_jobs", lambda: jobs)
    monkeypatch.setattr(slurm, "signal_ranks", lambda job, _name: signalled.append(job) is None)
    assert control.stop_run(run)["action"] == "asked to save and stop"
    assert signalled == sent
    assert RunPaths(run).stop.read_text() == "USR1 7\n"


@pytest.mark.parametrize(("command", "name"), [(control.stop_run, "USR1"), (control.cancel_run, "TERM")])
def test_only_the_ranks_in_an_allocation_are_signalled(
    slurm_run: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[[Path], object], name: str
) -> None:
    """The job is the user's shell. Until rank 0 has recorded the ranks' step, the file must do."""
    run = slurm_run
    sent: list[tuple[str, str]] = []
    monkeypatch.setattr(slurm, "signal_ranks", lambda *words: sent.append(words) is None)
    begin(run, "7", "n1", None)
    command(run)
    assert sent == []
    assert RunPaths(run).stop.read_text() == f"{name} 7\n"
    RunPaths(run).slurm_step.write_text("7.3\n")
    command(run)
    assert sent == [("7.3", name)]


@pytest.mark.parametrize(("command", "text"), [(control.stop_run, "USR1\n"), (control.cancel_run, "TERM\n")])
@pytest.mark.parametrize("backend", ["local", "ssh"])
def test_without_a_queue_the_launcher_reads_the_request_from_a_file(
    make_run, command: Callable[[Path], dict[str, object]], text: str, backend: str
) -> None:
    run, manifest = make_run()
    write_json(run / "manifest.json", {**manifest.as_dict(), "backend": backend})
    with pytest.raises(UserError, match="not started; there is nothing to stop"):
        command(run)
    with only_launcher(run):
        assert command(run)["job"] is None
    assert RunPaths(run).stop.read_text() == text
