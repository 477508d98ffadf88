"""Real training on the real Slurm: from submit to a student, and losses that an interruption does not change.

The tiny fixture models on gloo, fp32. Two ranks on two nodes, where the uninterrupted run is the yardstick.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import tiny
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.runs import Runs
from tests.test_end_to_end import rank_processes

STEPS = 24

# With the uninterrupted run that the first of them needs, on a busy machine.
pytestmark = pytest.mark.timeout(1500)


def configuration(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    records = [tiny.CASES[name]["record"] for name in ("v1", "rounds", "text")] * 107
    (folder / "data.json").write_text(json.dumps(records))
    document = {
        "model": {"teacher": str(tiny.TEACHER), "student": str(tiny.STUDENT)},
        "data": {"sources": [{"file": "data.json", "image_folder": str(tiny.FOLDER)}], "workers": 1},
        "training": {
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "precision": "fp32",
            "learning_rate": 1e-3,
            "max_steps": STEPS,
        },
        "checkpoint": {"every": 5},
        "slurm": {
            "gpu_option": "none",
            "network_interface": "lo",  # the nodes are this machine
            "export": {"ALIGNKD_MASTER_ADDR": "127.0.0.1"},
            "signal_seconds": 300,
        },
    }
    path = folder / "alignkd.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture
def train(cluster: Cluster, tmp_path: Path) -> Runs:
    return Runs(cluster, tmp_path, configuration(tmp_path))


@pytest.fixture(scope="package")
def losses(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Of the uninterrupted run, step by step."""
    runs = Runs(slurm, folder := tmp_path_factory.mktemp("whole"), configuration(folder))
    runs.alignkd("launch", runs.config, "--nodes", 2, "--backend", "slurm")
    run = folder / "runs" / "run"
    wait_for((run / "student" / "config.json").exists, "a student")
    return [row["loss"] for row in rows(run)]


def rows(run: Path) -> list[dict[str, Any]]:
    return tiny.metrics_rows(run)


def launched(runs: Runs, nodes: int = 2) -> tuple[Path, str]:
    """A run that trains: (folder, job)."""
    text = runs.alignkd("launch", runs.config, "--nodes", nodes, "--backend", "slurm")
    return runs.folder / "runs" / "run", text.partition("submitted job ")[2].split()[0].rstrip(";")


def halt(run: Path) -> None:
    """Stop one rank: the training cannot end before the event comes. The SIGCONT that Slurm sends along
    with every signal wakes it up."""
    os.kill(min(rank_processes(run)), signal.SIGSTOP)


def assert_same_losses(run: Path, losses: list[float]) -> None:
    """Those of every step, before and after the interruption."""
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in rows(run)] == pytest.approx(losses, abs=1e-6, rel=0)


def test_four_nodes_from_submit_to_student(train: Runs) -> None:
    run, job = launched(train, nodes=4)
    assert train.wait_for_end(job) == "COMPLETED", train.log(run)
    assert (run / "student" / "model.safetensors").exists()
    assert train.reasons(run) == ["done"]
    assert rows(run)[-1]["loss"] < rows(run)[0]["loss"]
    # One rank on each node.
    for rank in range(4):
        assert f"job {job} on n{rank + 1}" in (run / "logs" / f"rank-{rank}.log").read_text()


def test_ranks_that_get_no_gpu_name_node_and_reason_and_end(train: Runs) -> None:
    """The job has (pretended) GPUs, but no driver is there. It used to train on the CPU."""
    site = {"slurm.gpu_option": "gpus-per-node", "slurm.max_restarts": 0}
    settings = [word for key, value in site.items() for word in ("--set", f"{key}={value}")]
    text = train.alignkd("launch", train.config, "--nodes", 2, "--backend", "slurm", *settings)
    run, job = train.folder / "runs" / "run", text.partition("submitted job ")[2].split()[0].rstrip(";")
    assert train.wait_for_end(job) == "FAILED", train.log(run)
    (attempt,) = train.attempts(run)
    assert (attempt.reason, attempt.exit_code) == ("unusable node", 88)
    assert set(attempt.bad_nodes) <= {"n1", "n2"}
    assert attempt.bad_nodes
    detail = train.json("status", run)["detail"]
    assert re.search(r"unusable node: rank \d ended with exit code 88: rank \d on n\d sees no GPU: ", detail)
    assert not (run / "metrics.jsonl").exists()


def test_a_preempted_run_ends_with_the_undisturbed_losses(
    train: Runs, cluster: Cluster, losses: list[float]
) -> None:
    run, job = launched(train)
    train.wait_for_step(run, 7)
    halt(run)
    cluster.preempt()
    assert train.wait_for_end(job) == "COMPLETED", train.log(run)
    first, second = train.attempts(run)
    assert (first.reason, second.reason, first.job, second.job) == ("preempted", "done", job, job)
    assert first.lost_steps == 0
    assert second.first_step == first.last_step < STEPS
    assert_same_losses(run, losses)


def test_a_run_over_its_time_limit_ends_with_the_undisturbed_losses(
    train: Runs, cluster: Cluster, losses: list[float]
) -> None:
    run, job = launched(train)
    train.wait_for_step(run, 3)
    halt(run)
    started = time.time()
    cluster.end_in(job, 280)  # less than `signal_seconds`: USR1 comes as soon as Slurm looks
    wait_for(lambda: train.attempts(run), "USR1 before the limit")
    unlimited = ("scontrol", "update", f"JobId={job}", "TimeLimit=UNLIMITED")
    wait_for(lambda: cluster.run(*unlimited) == "", "the requeue")
    assert train.wait_for_end(job) == "COMPLETED", train.log(run)
    first, second = train.attempts(run)
    assert (first.reason, first.lost_steps, second.reason) == ("time limit", 0, "done")
    assert (first.job, second.job) == (job, job)
    assert second.first_step == first.last_step < STEPS
    assert first.end < started + 280  # USR1 did it, not the limit itself
    assert_same_losses(run, losses)


def test_a_run_that_loses_a_node_ends_with_the_undisturbed_losses(
    train: Runs, cluster: Cluster, losses: list[float]
) -> None:
    run, job = launched(train)
    train.wait_for_step(run, 7)
    cluster.lose_node("n2")
    try:
        cluster.notice("n2")
        wait_for((run / "exits" / "rank-0").exists, "the end of rank 0")
        cluster.clear(job)
        assert train.wait_for_end(job) == "COMPLETED", train.log(run)
    finally:
        cluster.start_node("n2")
    first, second = train.attempts(run)
    assert (first.reason, first.bad_nodes, second.reason) == ("node lost", ("n2",), "done")
    assert (first.job, second.job) == (job, job)
    assert "n2" not in second.nodes
    assert second.first_step == first.saved_step > 0
    assert_same_losses(run, losses)
