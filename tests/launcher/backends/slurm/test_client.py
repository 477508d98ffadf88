from datetime import datetime
from pathlib import Path

import pytest

from alignkd.errors import AlignkdError, UserError
from launcher.backends.slurm import client as slurm
from launcher.backends.slurm.client import (
    clean_environment,
    job_state,
    lost_nodes,
    queue_seconds,
    queued_jobs,
    slurm_answers,
    submit,
)
from launcher.backends.slurm.lifecycle import JobState


def put_program(folder: Path, name: str, body: str, monkeypatch) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_submit(tmp_path, monkeypatch) -> None:
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


def test_nothing_of_a_surrounding_job_reaches_a_new_one() -> None:
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
    monkeypatch.setattr(slurm, "ask", lambda *_: text)


def test_what_slurm_says_of_a_job(monkeypatch) -> None:
    show(monkeypatch)
    assert job_state("5") == JobState("RUNNING", "None", False)
    assert queue_seconds("5") == 60
    show(monkeypatch, state="COMPLETING", reason="TimeLimit", start="Unknown")
    assert job_state("5") == JobState("COMPLETING", "TimeLimit", False)
    assert queue_seconds("5") is None
    show(monkeypatch, preempt="2026-01-02T03:04:05")
    assert job_state("5").preempted
    monkeypatch.setattr(slurm, "ask", lambda *_: None)
    assert job_state("5") == JobState()


def test_a_requeue_under_way_is_seen(monkeypatch) -> None:
    show(monkeypatch, state="COMPLETING")
    assert not job_state("5").requeued
    monkeypatch.setattr(slurm, "ask", lambda *_: SHOWN.replace("Restarts=0", "Restarts=1"))
    assert job_state("5").requeued
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # this start is that one already
    assert not job_state("5").requeued


def test_lost_nodes(monkeypatch) -> None:
    states = {
        "n1": "IDLE BootTime=2026-01-01T00:00:00",
        "n2": "MIXED+NOT_RESPONDING BootTime=2026-01-01T00:00:00",
        "n3": "DOWN* BootTime=None",
        "n4": "MIXED BootTime=2026-01-03T00:00:00",  # has started again
        "n5": "DOWN+DRAIN BootTime=None",
        "n6": "POWERED_DOWN BootTime=None",
    }
    lines = [f"NodeName={name} CPULoad=1 State={state} Reason=DOWN?" for name, state in states.items()]
    monkeypatch.setattr(slurm, "ask", lambda *_: "\n".join(lines))
    since = datetime(2026, 1, 2).timestamp()
    assert lost_nodes("n[1-6]", since) == ["n2", "n3", "n4", "n5"]
    assert lost_nodes("", since) == []
    monkeypatch.setattr(slurm, "ask", lambda *_: None)
    assert lost_nodes("n[1-6]", since) == []


def test_jobs_are_found_by_their_script(monkeypatch) -> None:
    run = Path("/r/a |b")
    lines = [
        f"7|PENDING|Priority|N/A|{run}/job.sbatch",
        "8|RUNNING|None|2026-01-02T03:04:05|/other/job.sbatch",
    ]
    monkeypatch.setattr(slurm, "ask", lambda *_: "\n".join(lines) + "\n")
    (job,) = queued_jobs(run) or []
    assert (job.id, job.state, job.reason, job.start) == ("7", "PENDING", "Priority", None)
    monkeypatch.setattr(slurm, "ask", lambda *_: None)
    assert queued_jobs(run) is None


def test_jobs_are_found_through_a_link_to_the_folder(tmp_path, monkeypatch) -> None:
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "home").symlink_to(tmp_path / "disk")
    line = f"7|RUNNING|None|N/A|{tmp_path}/disk/run/job.sbatch\n"
    monkeypatch.setattr(slurm, "ask", lambda *_: line)
    assert [job.id for job in queued_jobs(tmp_path / "home" / "run") or []] == ["7"]
