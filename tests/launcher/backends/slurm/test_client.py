from datetime import datetime
from pathlib import Path

import pytest

from alignkd.errors import AlignkdError, UserError
from launcher.backends.base import QueuedJob
from launcher.backends.slurm import client as slurm
from launcher.backends.slurm.client import (
    clean_environment,
    job_state,
    lost_nodes,
    may_be_requeued,
    queue_seconds,
    queued_jobs,
    retarget_dependency,
    slurm_answers,
    submit,
)
from launcher.backends.slurm.lifecycle import JobState


def put_program(folder: Path, name: str, body: str, monkeypatch) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_a_submission_returns_the_job_or_what_sbatch_said(tmp_path, monkeypatch) -> None:
    put_program(tmp_path / "bin", "sbatch", 'echo "42;cluster"', monkeypatch)
    assert submit(tmp_path) == "42"
    put_program(tmp_path / "bin", "sbatch", "echo Invalid account >&2; exit 1", monkeypatch)
    with pytest.raises(AlignkdError, match="Invalid account"):
        submit(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--backend local"):
        submit(tmp_path)


def test_slurm_answers_only_when_a_controller_is_up(tmp_path, monkeypatch) -> None:
    put_program(tmp_path / "bin", "sbatch", "true", monkeypatch)
    put_program(tmp_path / "bin", "scontrol", 'echo "Slurmctld(primary) at x is UP"', monkeypatch)
    assert slurm_answers()
    put_program(tmp_path / "bin", "scontrol", 'echo "Slurmctld(primary) at x is DOWN"', monkeypatch)
    assert not slurm_answers()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not slurm_answers()


def test_variables_of_a_surrounding_job_do_not_reach_a_new_one() -> None:
    left = {"SLURM_JOB_ID": "1", "SBATCH_PARTITION": "x", "SRUN_DEBUG": "1", "ALIGNKD_RUN": "/a"}
    kept = {"SLURM_CONF": "/etc/slurm.conf", "PATH": "/bin", "ALIGNKD_MASTER_ADDR": "n1"}
    assert clean_environment({**left, **kept}) == kept


SHOWN = (
    "JobId=5 JobName=run UserId=u(1) JobState={state} Reason={reason} Requeue=1 Restarts=0 "
    "SubmitTime=2026-01-02T03:04:05 EligibleTime=2026-01-02T03:04:05 StartTime={start} "
    "PreemptTime={preempt} Command=/a JobState=FAILED Reason=TimeLimit PreemptTime=x/job.sbatch WorkDir=/"
)


def show(monkeypatch, state="RUNNING", reason="None", start="2026-01-02T03:05:05", preempt="None") -> None:
    text = SHOWN.format(state=state, reason=reason, start=start, preempt=preempt)
    monkeypatch.setattr(slurm, "run_slurm_command", lambda *_: text)


def test_the_state_of_a_job_is_read_from_scontrol(monkeypatch) -> None:
    show(monkeypatch)
    assert job_state("5") == JobState("RUNNING", "None", False)
    assert queue_seconds("5") == 60
    show(monkeypatch, state="COMPLETING", reason="TimeLimit", start="Unknown")
    assert job_state("5") == JobState("COMPLETING", "TimeLimit", False)
    assert queue_seconds("5") is None
    show(monkeypatch, preempt="2026-01-02T03:04:05")
    assert job_state("5").preempted
    monkeypatch.setattr(slurm, "run_slurm_command", lambda *_: None)
    assert job_state("5") == JobState()


def test_a_requeue_in_progress_is_detected(monkeypatch) -> None:
    show(monkeypatch, state="COMPLETING")
    assert not job_state("5").requeued
    monkeypatch.setattr(slurm, "run_slurm_command", lambda *_: SHOWN.replace("Restarts=0", "Restarts=1"))
    assert job_state("5").requeued
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # this start is that requeue
    assert not job_state("5").requeued


def test_lost_nodes_are_down_silent_or_rebooted(monkeypatch) -> None:
    states = {
        "n1": "IDLE BootTime=2026-01-01T00:00:00",
        "n2": "MIXED+NOT_RESPONDING BootTime=2026-01-01T00:00:00",
        "n3": "DOWN* BootTime=None",
        "n4": "MIXED BootTime=2026-01-03T00:00:00",  # has rebooted
        "n5": "DOWN+DRAIN BootTime=None",
        "n6": "POWERED_DOWN BootTime=None",
    }
    lines = [f"NodeName={name} CPULoad=1 State={state} Reason=DOWN?" for name, state in states.items()]
    monkeypatch.setattr(slurm, "run_slurm_command", lambda *_: "\n".join(lines))
    since = datetime(2026, 1, 2).timestamp()
    assert lost_nodes("n[1-6]", since) == ["n2", "n3", "n4", "n5"]
    assert lost_nodes("", since) == []
    monkeypatch.setattr(slurm, "run_slurm_command", lambda *_: None)
    assert lost_nodes("n[1-6]", since) == []


def test_jobs_are_found_by_their_script(monkeypatch) -> None:
    run = Path("/r/a |b")
    lines = [
        f"7|PENDING|Priority|N/A|{run}/job.sbatch",
        "8|RUNNING|None|2026-01-02T03:04:05|/other/job.sbatch",
    ]
    monkeypatch.setattr(slurm, "run_slurm_command", lambda *_: "\n".join(lines) + "\n")
    (job,) = queued_jobs(run) or []
    assert (job.id, job.state, job.reason, job.start) == ("7", "PENDING", "Priority", None)
    monkeypatch.setattr(slurm, "run_slurm_command", lambda *_: None)
    assert queued_jobs(run) is None


def test_jobs_are_found_through_a_symbolic_link_to_the_folder(tmp_path, monkeypatch) -> None:
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "home").symlink_to(tmp_path / "disk")
    line = f"7|RUNNING|None|N/A|{tmp_path}/disk/run/job.sbatch\n"
    monkeypatch.setattr(slurm, "run_slurm_command", lambda *_: line)
    assert [job.id for job in queued_jobs(tmp_path / "home" / "run") or []] == ["7"]


def test_only_a_pending_next_stage_gets_another_dependency(tmp_path, monkeypatch) -> None:
    sent = []
    monkeypatch.setattr(slurm, "run_slurm_command", lambda *words: sent.append(words))
    jobs = [QueuedJob("7", "PENDING", "Dependency", None, ""), QueuedJob("8", "RUNNING", "None", None, "")]
    monkeypatch.setattr(slurm, "queued_jobs", lambda run: jobs if run == Path("/r/b") else [])
    retarget_dependency(tmp_path, "9")
    assert sent == []
    (tmp_path / "next.json").write_text('{"run": "/r/b"}')
    retarget_dependency(tmp_path, "9")
    assert sent == [("scontrol", "update", "JobId=7", "Dependency=afterok:9")]


def test_a_job_may_be_requeued_if_slurm_says_so(monkeypatch) -> None:
    show(monkeypatch)
    assert may_be_requeued("5")
    monkeypatch.setattr(slurm, "run_slurm_command", lambda *_: SHOWN.replace("Requeue=1", "Requeue=0"))
    assert not may_be_requeued("5")
    monkeypatch.setattr(slurm, "run_slurm_command", lambda *_: None)
    assert not may_be_requeued("5")
