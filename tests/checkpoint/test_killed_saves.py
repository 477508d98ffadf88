"""Processes that are really killed during a save: the next start resumes from a whole checkpoint, as if
nothing had happened. ``make chaos`` has every phase with every victim."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from alignkd.run_folder.checkpoints import committed_steps
from alignkd.run_folder.paths import RunPaths
from tests import tiny
from tests.checkpoint.killing import start_with_kill, wait_until_gone, write_manifest
from tests.checkpoint.test_failed_saves import train_with_fault
from tests.ranks import RankPool

KILLS = [  # phase and rank at which VICTIM is killed, newest checkpoint that must be there afterwards
    ("begin", 0, "rank", 1),
    ("snapshot", 1, "rank", 1),
    ("between", 0, "rank", 1),
    ("between", 1, "all", 1),
    ("between", 0, "parent", 1),
    ("shards", 1, "rank", 1),
    ("flush", 1, "all", 1),
    ("manifest", 0, "rank", 1),
    ("manifest", 0, "parent", 1),
    ("publish", 0, "all", 1),
    ("mark", 0, "rank", 1),
    ("mark", 0, "parent", 1),
    ("latest", 0, "all", 2),
    ("removal", 0, "rank", 2),
    ("removal", 0, "parent", 2),
]


@pytest.fixture(scope="module")
def whole(two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run."""
    run = tiny.write_run(
        tmp_path_factory.mktemp("whole") / "run", 2, checkpoint__every=1, checkpoint__keep_last=1
    )
    assert two_ranks.run(train_with_fault, str(run), "latest", 0, [99]) == [0, 0]
    return run


def fresh_copy(whole: Path, to: Path) -> Path:
    kept = shutil.ignore_patterns("checkpoints", "student", "metrics.jsonl", "result.json", "progress.json")
    return Path(shutil.copytree(whole, to, ignore=kept))


def same_trajectory(run: Path, whole: Path) -> None:
    losses = [[row["loss"] for row in tiny.metrics_rows(folder)] for folder in (run, whole)]
    assert losses[0] == losses[1]
    ours, expected = (load_file(folder / "student" / "model.safetensors") for folder in (run, whole))
    assert all(ours[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("phase", "rank", "victim", "newest"), KILLS, ids=[f"{phase}-{victim}" for phase, _, victim, _ in KILLS]
)
def test_a_run_killed_in_a_save_resumes_from_a_whole_checkpoint(
    two_ranks: RankPool, whole: Path, tmp_path: Path, phase: str, rank: int, victim: str, newest: int
) -> None:
    run = fresh_copy(whole, tmp_path / "run")
    write_manifest(run)
    code = start_with_kill(run, phase, rank, victim, 2).wait(timeout=180)
    wait_until_gone(run)
    if victim == "parent":
        assert code == -signal.SIGKILL
    else:
        assert "was killed by SIGKILL" in (run / "launcher.log").read_text()
    assert committed_steps(run)[0] == newest
    assert two_ranks.run(train_with_fault, str(run), "latest", 0, [99]) == [0, 0]
    same_trajectory(run, whole)
    left = {path.name for path in RunPaths(run).checkpoints.iterdir()}
    # The last two: the one resumed from, and one that was whole, for want of a marker.
    unmarked = {"step-2.unmarked"} if phase == "mark" else set()
    assert left == {"step-4", "latest", f"step-{newest}"} | unmarked
