from datetime import datetime
from pathlib import Path

import pytest

from launcher.backends.slurm import client as slurm
from launcher.backends.slurm.client import (
    clean_environment,
    lost_nodes,
    queued_jobs,
    running_jobs,
    slurm_answers,
)
from tests.launcher.backends.slurm.programs import put_program


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


@pytest.mark.parametrize(
    ("body", "running"),
    [
        ("echo 7; echo 8", {"7", "8"}),
        ("true", set()),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", set()),  # forgotten: an answer
        ("echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1", None),
    ],
)
def test_silence_is_not_taken_for_a_job_that_is_not_running(tmp_path, monkeypatch, body, running) -> None:
    put_program(tmp_path / "bin", "squeue", body, monkeypatch)
    assert running_jobs(["7", "8"]) == running
    monkeypatch.setenv("PATH", str(tmp_path))  # not installed
    assert running_jobs(["7"]) is None
    assert running_jobs([]) == set()
