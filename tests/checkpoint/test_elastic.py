"""A run that goes on at another number of ranks, or at stage 1 instead of 2: the run that would have been."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from tests.engine.test_training_run import train_run
from tests.ranks import RankPool

SAVED = 85
METRICS = ("loss", "ce", "reverse_kl", "attention", "vision_all", "vision_focus", "gradient_norm")


@pytest.fixture(scope="module")
def pools(one_rank: RankPool, two_ranks: RankPool, four_ranks: RankPool) -> dict[int, RankPool]:
    return {1: one_rank, 2: two_ranks, 4: four_ranks}


@pytest.fixture(scope="module")
def whole(two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody stopped, at stage 1."""
    run = tiny.write_run(
        tmp_path_factory.mktemp("whole") / "run", 2, student__zero_stage=1, training__epochs=2
    )
    assert two_ranks.run(train_run, str(run)) == [0, 0]
    return run


def assert_same_curve(run: Path, whole: Path) -> None:
    ours, expected = tiny.metrics_rows(run), tiny.metrics_rows(whole)
    assert [row["step"] for row in ours] == [row["step"] for row in expected]
    for mine, theirs in zip(ours, expected, strict=True):
        for name in METRICS:
            assert mine[name] == pytest.approx(theirs[name], abs=1e-5, rel=0), (mine["step"], name)
        for name in ("learning_rate", "projector_learning_rate", "adapter_learning_rate", "samples", "epoch"):
            assert mine[name] == theirs[name]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_four_two_one_four_ranks(pools: dict[int, RankPool], whole: Path, tmp_path: Path, stage: int) -> None:
    run = tiny.write_run(tmp_path / "run", 4, student__zero_stage=stage, training__epochs=2)
    assert pools[4].run(train_run, str(run), 2) == [SAVED] * 4
    for world_size in (2, 1):
        tiny.resize_run(run, world_size)
        assert pools[world_size].run(train_run, str(run), 2) == [SAVED] * world_size
    tiny.resize_run(run, 4)
    assert pools[4].run(train_run, str(run)) == [0] * 4
    assert_same_curve(run, whole)
