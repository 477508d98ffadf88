"""Failures before any rank can log: `alignkd status` and `logs` show them, with their cause."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.runs import Runs


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """A home folder of its own, as the variable that names it."""
    (tmp_path / "home").mkdir()
    return {"HOME": str(tmp_path / "home")}


def test_a_missing_interpreter_is_named(runs: Runs) -> None:
    run = runs.prepare(nodes=1)
    with (run / "env.sh").open("a") as file:
        file.write("export PYTHON=/nowhere/python\n")
    job = runs.json("resume", run)["job"]
    assert runs.wait_for_end(job) == "FAILED"
    state = runs.json("status", run)
    assert (state["state"], state["job"], state["next"]) == ("failed", job, f"alignkd logs {run} --errors")
    cause = "the job script failed: /nowhere/python: No such file or directory"
    assert state["detail"] == f"job {job} ended before an attempt began: {cause}"
    assert f"cause: {cause}" in runs.alignkd("logs", run, "--errors")
    assert "/nowhere/python: No such file or directory" in runs.alignkd("logs", run, "--job")


def test_an_srun_that_cannot_start_is_named(runs: Runs) -> None:
    """sbatch accepts the job: it does not know srun's options."""
    run = runs.prepare(nodes=1, slurm={"srun_options": {"nodelist": "n9"}, "max_restarts": 0})
    job = runs.json("resume", run)["job"]
    assert runs.wait_for_end(job) == "FAILED"
    state = runs.json("status", run)
    assert state["state"] == "failed"
    assert state["detail"].startswith("crashed: srun: ")
    shown = runs.alignkd("logs", run, "--errors")
    assert shown.startswith("attempt 1: no rank recorded an exit; the end of ")
    assert "srun: error: " in shown


def test_a_node_without_the_run_folder_leaves_a_trace(
    runs: Runs, cluster: Cluster, home: dict[str, str]
) -> None:
    run = runs.prepare(nodes=1, slurm={"sbatch_options": {"hold": True}})
    job = runs.json("resume", run, **home)["job"]
    run.rename(away := run.with_name("away"))
    cluster.run("scontrol", "release", job)
    assert runs.wait_for_end(job) == "FAILED"
    away.rename(run)
    trace = Path(home["HOME"], f"alignkd-job-{job}.log")
    assert trace.read_text() == f"alignkd: n1 cannot write {run}/logs/slurm-{job}.log\n"
    state = runs.json("status", run, **home)
    assert state["state"] == "failed"
    assert f"n1 cannot write {run}/logs/slurm-{job}.log" in state["detail"]
    trace.unlink()  # homes may differ, too; then Slurm knows it for some minutes
    state = runs.json("status", run, **home)
    assert (
        state["detail"]
        == f"job {job} ended as FAILED without a log: n1 cannot write {run}/logs/slurm-{job}.log"
    )


def test_a_job_that_was_cancelled_in_the_queue_has_not_failed(runs: Runs, cluster: Cluster) -> None:
    run = runs.prepare(nodes=1, slurm={"sbatch_options": {"hold": True}})
    job = runs.json("resume", run)["job"]
    cluster.run("scancel", job)
    assert runs.wait_for_end(job) == "CANCELLED"
    state = runs.json("status", run)
    assert (state["state"], state["detail"]) == ("cancelled", f"job {job}, before it started")
