"""A rank that is stopped, on the real Slurm: it is named, its step is ended, and the run resumes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from launcher.run.logs import first_error
from tests.checkpoint.killing import rank_processes
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.runs import Runs
from tests.slurm.test_training import STEPS, assert_same_losses, configuration, losses, rows

__all__ = ["losses"]  # the fixture

pytestmark = pytest.mark.timeout(1500)


@pytest.fixture
def train(cluster: Cluster, tmp_path: Path) -> Runs:
    return Runs(cluster, tmp_path, configuration(tmp_path))


def process_of_rank(run: Path, rank: int) -> int:
    found = [
        pid
        for pid in rank_processes(run)
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    ]
    return min(found)  # workers of the loader are younger


def test_a_stopped_rank_is_named_and_the_run_ends_with_the_undisturbed_losses(
    train: Runs, cluster: Cluster, losses: list[float]
) -> None:
    text = train.alignkd(
        *("launch", train.config, "--nodes", 2, "--backend", "slurm", "--set", "training.hang_seconds=20")
    )
    run = train.folder / "runs" / "run"
    job = text.partition("submitted job ")[2].split()[0].rstrip(";")
    train.wait_for_step(run, 7)
    os.kill(process_of_rank(run, 1), signal.SIGSTOP)
    wait_for(lambda: train.attempts(run), "the end of the attempt")
    assert train.wait_for_end(job) == "COMPLETED", train.log(run)
    first, second = train.attempts(run)
    assert (first.reason, first.failed_rank, first.bad_nodes, second.reason) == ("hung", 1, ("n2",), "done")
    assert second.first_step == first.saved_step > 0
    assert "rank 1 on n2 is behind" in (run / "logs" / f"slurm-{job}.log").read_text()
    assert "most recent call first" in (run / "logs" / "rank-0.log").read_text()
    error = first_error(run, None)
    assert error is not None
    assert "rank 1 on n2 is behind" in error.lines[0]
    assert rows(run)[-1]["step"] == STEPS
    assert_same_losses(run, losses)
