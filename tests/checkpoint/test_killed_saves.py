"""Ranks that are really killed in the middle of a save: the next start picks a whole checkpoint."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from alignkd.checkpoint.layout import checkpoints_folder, committed_steps
from launcher.operators import build_cpu_operators
from launcher.ranks import free_port, rank_environments, start_ranks
from tests import tiny
from tests.checkpoint.test_failed_saves import train_with_fault
from tests.ranks import RankPool

KILLS = [  # phase, rank, newest checkpoint that must be there afterwards
    ("begin", "0", 1),
    ("shards", "1", 1),
    ("shards", "all", 1),
    ("seal", "1", 1),
    ("manifest", "0", 1),
    ("publish", "0", 1),
    ("mark", "0", 1),
    ("latest", "0", 2),
    ("removal", "0", 2),
]


@pytest.fixture(scope="module")
def whole(two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbed."""
    run = tiny.write_run(
        tmp_path_factory.mktemp("whole") / "run", 2, checkpoint__every=1, checkpoint__keep_last=1
    )
    assert two_ranks.run(train_with_fault, str(run), "latest", 0, [99]) == [0, 0]
    return run


def fresh_copy(whole: Path, to: Path) -> Path:
    kept = shutil.ignore_patterns("checkpoints", "student", "metrics.jsonl", "result.json", "progress.json")
    return Path(shutil.copytree(whole, to, ignore=kept))


def run_until_killed(run: Path, phase: str, rank: str) -> list[int]:
    """Exit codes of the ranks; the survivors are ended as a launcher ends them."""
    environments = rank_environments(1, 2, free_port(), "cpu", [], os.environ)
    build_cpu_operators(environments[0], print)
    logs = run / "logs"
    logs.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.checkpoint.faulty_storage", str(run), phase, rank, "2"]
    group = start_ranks(command, environments, logs)
    ended = group.next_exit(120)
    assert ended is not None, "nobody was killed"
    group.stop(0.5)
    while group.running:
        group.next_exit(5)
    return list(group.codes.values())


@pytest.mark.parametrize(
    ("phase", "rank", "newest"), KILLS, ids=[f"{phase}-{rank}" for phase, rank, _ in KILLS]
)
def test_killed_in_a_save(
    two_ranks: RankPool, whole: Path, tmp_path: Path, phase: str, rank: str, newest: int
) -> None:
    run = fresh_copy(whole, tmp_path / "run")
    assert -signal.SIGKILL in run_until_killed(run, phase, rank)
    assert committed_steps(run)[0] == newest
    assert two_ranks.run(train_with_fault, str(run), "latest", 0, [99]) == [0, 0]
    assert [row["loss"] for row in tiny.metrics_rows(run)] == [
        row["loss"] for row in tiny.metrics_rows(whole)
    ]
    ours, expected = (load_file(folder / "student" / "model.safetensors") for folder in (run, whole))
    assert all(ours[name].equal(expected[name]) for name in expected)
    left = {path.name for path in checkpoints_folder(run).iterdir() if path.suffix != ".tmp"}
    assert {"step-4", "latest"} <= left <= {"step-4", "latest", f"step-{newest}", "step-1"}
    assert not list(checkpoints_folder(run).glob("*.tmp"))
