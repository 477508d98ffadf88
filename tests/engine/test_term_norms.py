"""Gradient norms of the terms while a run trains, on real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignkd.data.batch import Batch
from alignkd.distributed.ranks import Ranks
from alignkd.engine.balance import Balance
from alignkd.engine.setup import prepare
from alignkd.engine.term_norms import TermNorms
from alignkd.run_folder.progress import Progress
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


def measured(ranks: Ranks, run: str, windows: list[list[Batch]]) -> list[dict[str, float]]:
    """By window: the columns, where rank 0 has the first micro-batch and rank 1 the second."""
    state = prepare(Path(run), ranks, Progress(Path(run), writes=ranks.is_first))
    norms = TermNorms(state, Balance(state.config.distillation, {}))
    columns = [norms.columns(1, [window[ranks.rank]]) for window in windows]
    state.loader.close()
    return columns


def test_a_norm_is_the_mean_over_the_ranks_that_have_the_term(two_ranks: RankPool, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run", 2, logging__gradient_norms_every=1)
    image, text = tiny.batch_of("v1"), tiny.batch_of("text")
    windows = [[image, image], [image, text], [text, text]]
    first, second = two_ranks.run(measured, str(run), windows)
    assert first == second
    images, mixed, texts = first
    of_images = {f"gradient_norm_of_{term}" for term in ("attention", "vision_all", "vision_focus")}
    for name in of_images:
        assert mixed[name] == pytest.approx(images[name], rel=1e-6)
        assert images[name] > 0 == texts[name]
    for name in NAMES - of_images:
        squares = (images[name] ** 2, texts[name] ** 2)
        assert mixed[name] == pytest.approx((sum(squares) / 2) ** 0.5, rel=1e-6)
