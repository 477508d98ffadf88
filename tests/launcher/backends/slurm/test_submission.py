from __future__ import annotations

from pathlib import Path

import pytest

from alignkd.errors import AlignkdError, UserError
from launcher.backends.base import QueuedJob
from launcher.backends.slurm import submission
from launcher.backends.slurm.submission import (
    can_run_without,
    retarget_dependency,
    submission_environment,
    submit,
)
from tests.launcher.backends.slurm.programs import put_program


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "job.sbatch").write_text("#!/bin/bash\n#SBATCH --partition=gpu\n")
    return tmp_path


def test_a_submission_returns_the_job_or_what_sbatch_said(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_program(run / "bin", "sbatch", 'echo "42;cluster"', monkeypatch)
    assert submit(run) == "42"
    put_program(run / "bin", "sbatch", "echo Invalid account >&2; exit 1", monkeypatch)
    with pytest.raises(AlignkdError, match="Invalid account"):
        submit(run)
    monkeypatch.setenv("PATH", str(run))
    with pytest.raises(UserError, match="--backend local"):
        submit(run)


@pytest.mark.parametrize(("code", "can"), [(0, True), (1, False)])
def test_slurm_is_asked_whether_a_job_can_do_without_some_nodes(
    run: Path, monkeypatch: pytest.MonkeyPatch, code: int, can: bool
) -> None:
    put_program(run / "bin", "sbatch", f'echo "$@" >"{run}/asked"; exit {code}', monkeypatch)
    assert can_run_without(run, "n1,n3") == can
    assert (run / "asked").read_text() == f"--test-only --exclude=n1,n3 {run}/job.sbatch\n"
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert not can_run_without(run, "n1")


def test_defaults_of_the_login_shell_hold_where_the_script_sets_nothing() -> None:
    login = {"SBATCH_ACCOUNT": "me", "SBATCH_PARTITION": "debug", "SBATCH_TIMELIMIT": "1", "PATH": "/bin"}
    job = {"SLURM_JOB_ID": "1", "SBATCH_EXPORT": "NONE", "SBATCH_MEM_BIND": "x", "SRUN_DEBUG": "1"}
    script = "#!/bin/bash\n#SBATCH --partition=gpu\n#SBATCH --time=4\n# --account=you is no directive\n"
    assert submission_environment(script, {**login, **job}) == {"SBATCH_ACCOUNT": "me", "PATH": "/bin"}


def test_only_a_pending_next_stage_gets_another_dependency(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, ...]] = []
    monkeypatch.setattr(submission, "run_slurm_command", lambda *words: sent.append(words) or "")
    jobs = [QueuedJob("7", "PENDING", "Dependency", None, ""), QueuedJob("8", "RUNNING", "None", None, "")]
    monkeypatch.setattr(submission, "queued_jobs", lambda run: jobs if run == Path("/r/b") else [])
    assert retarget_dependency(tmp_path, "9")
    assert sent == []
    (tmp_path / "next.json").write_text('{"run": "/r/b"}')
    assert retarget_dependency(tmp_path, "9")
    assert sent == [("scontrol", "update", "JobId=7", "Dependency=afterok:9")]


def test_a_dependency_counts_as_changed_only_if_slurm_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "next.json").write_text('{"run": "/r/b"}')
    monkeypatch.setattr(submission, "queued_jobs", lambda _run: None)
    assert not retarget_dependency(tmp_path, "9")
    jobs = [QueuedJob("7", "PENDING", "Dependency", None, "")]
    monkeypatch.setattr(submission, "queued_jobs", lambda _run: jobs)
    monkeypatch.setattr(submission, "run_slurm_command", lambda *_: None)
    assert not retarget_dependency(tmp_path, "9")
