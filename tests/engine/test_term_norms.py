"""Gradient norms of the terms while a run trains, on real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from tests.engine.test_training_run import same_but_for_times, train_run
from tests.ranks import RankPool

NAMES = {
    f"gradient_norm_of_{term}" for term in ("ce", "reverse_kl", "attention", "vision_all", "vision_focus")
}


def test_samples_change_no_bit_of_the_training_and_are_columns_of_their_rows(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    plain = tiny.write_run(tmp_path / "plain", 2, training__gradient_checkpointing=True)
    assert two_ranks.run(train_run, str(plain)) == [0, 0]
    run = tmp_path / "sampled"
    tiny.copy_untrained(plain, run)
    tiny.resize_run(run, 2, logging__gradient_norms_every=2)
    assert two_ranks.run(train_run, str(run)) == [0, 0]
    same_but_for_times(run, plain)
    rows = tiny.metrics_rows(run)
    assert [set(row) >= NAMES for row in rows] == [False, True, False, True]
    assert all(row[name] > 0 for row in rows[1::2] for name in NAMES)


def test_the_norm_of_the_only_term_is_that_of_the_step(one_rank: RankPool, tmp_path: Path) -> None:
    """One micro-batch is the whole step, and the cross-entropy the whole loss."""
    run = tiny.write_run(
        tmp_path / "run",
        1,
        distillation__enabled=False,
        training__global_batch_size=4,
        training__micro_batch_size=4,
        training__max_steps=2,
        logging__gradient_norms_every=1,
    )
    assert one_rank.run(train_run, str(run)) == [0]
    for row in tiny.metrics_rows(run):
        assert row["gradient_norm_of_ce"] == pytest.approx(row["gradient_norm"], rel=1e-4)
        assert sum(row[name] for name in NAMES) == row["gradient_norm_of_ce"]
