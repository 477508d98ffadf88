"""Four nodes, a stop, two nodes: the run that would have been, through the real Slurm."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from alignkd.run_folder.paths import RunPaths
from launcher.run.manifest import read_manifest
from tests import tiny
from tests.engine.test_training_run import train_run
from tests.ranks import RankPool
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.runs import Runs
from tests.slurm.test_training import STEPS, configuration


def test_a_run_on_four_nodes_resumes_on_two(cluster: Cluster, two_ranks: RankPool, tmp_path: Path) -> None:
    runs = Runs(cluster, tmp_path, configuration(tmp_path))
    text = runs.alignkd("launch", runs.config, "--nodes", 4, "--backend", "slurm")
    run, first = tmp_path / "runs" / "run", job_of(text)
    wait_for(lambda: runs.step(run) >= 3, "step 3")
    runs.alignkd("stop", run)
    runs.wait_for_end(first)
    (attempt,) = runs.attempts(run)
    assert (attempt.reason, attempt.lost_steps) == ("stopped", 0)
    assert attempt.saved_step is not None
    assert 3 <= attempt.saved_step < STEPS

    assert "node counts that fit with 1 rank each: 1, 2, 4" in runs.alignkd(
        "resume", run, "--nodes", 3, code=2
    )
    assert read_manifest(run).nodes == 4
    second = job_of(runs.alignkd("resume", run, "--nodes", 2))
    assert runs.wait_for_end(second) == "COMPLETED", runs.log(run)
    manifest = read_manifest(run)
    assert (manifest.nodes, manifest.world_size, manifest.accumulation_steps) == (2, 2, 2)
    assert [a.first_step for a in runs.attempts(run)] == [0, attempt.saved_step]
    for rank in range(4):
        log = (run / "logs" / f"rank-{rank}.log").read_text()
        assert f"job {first} on" in log
        assert (f"job {second} on" in log) == (rank < 2)
    assert (RunPaths(run).checkpoints / f"step-{attempt.saved_step}.universal").is_dir()

    # Nothing in it may know of a save: a start without checkpoints would be refused.
    records = ("checkpoints", "attempts.jsonl", "progress.json", "metrics.jsonl", "result.json")
    whole = Path(shutil.copytree(run, tmp_path / "whole", ignore=shutil.ignore_patterns(*records)))
    tiny.resize_run(whole, 2, data__workers=0)
    assert two_ranks.run(train_run, str(whole), timeout=300) == [0, 0]
    losses, expected = ([row["loss"] for row in tiny.metrics_rows(folder)] for folder in (run, whole))
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected, abs=1e-5, rel=0)


def job_of(text: str) -> str:
    return text.partition("submitted job ")[2].split()[0].rstrip(";")
