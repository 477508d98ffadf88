"""Random states: what was drawn after a save is drawn again after a resume."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alignkd.checkpoint.rank_state import load_rank_state, rank_state, seed_rank, write_rank_state
from alignkd.checkpoint.storage import Shards, Storage
from alignkd.distributed.ranks import Ranks
from alignkd.engine.setup import prepare
from alignkd.engine.signals import StopRequest
from alignkd.engine.trainer import Trainer
from alignkd.run_folder.progress import Progress
from tests import tiny
from tests.engine.test_training_run import StopAfter
from tests.ranks import RankPool


def draw() -> list[float]:
    """From each source, an odd number of normal ones included: they come in pairs."""
    return [
        random.random(),
        random.gauss(0.0, 1.0),
        float(np.random.random()),
        float(np.random.normal()),
        float(torch.rand(())),
        float(torch.randn(())),
    ]


def test_a_state_that_was_drawn_from_is_restored(tmp_path: Path) -> None:
    draw()
    described = rank_state()
    json.dumps(described)
    expected = [draw() for _ in range(3)]
    write_rank_state(tmp_path, 3, described)
    load_rank_state(tmp_path, 3)
    assert [draw() for _ in range(3)] == expected
    load_rank_state(tmp_path, 3)
    assert draw() == expected[0]


def test_states_on_other_ranks_follow_from_seed_step_and_rank() -> None:
    def drawn(seed: int, step: int, rank: int) -> list[float]:
        seed_rank(seed, step, rank)
        return draw()

    assert drawn(1, 4, 0) == drawn(1, 4, 0)
    different = [drawn(1, 4, 0), drawn(1, 4, 1), drawn(1, 5, 0), drawn(2, 4, 0)]
    for place in range(len(different[0])):
        assert len({numbers[place] for numbers in different}) == 4


class Drawing(Storage):
    """Draws right after each snapshot: the numbers that a resume has to draw next."""

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def snapshot_rank(self, engine: Any, partial: Path, rank: int, *, copies: bool) -> Shards:
        shards = super().snapshot_rank(engine, partial, rank, copies=copies)
        self.drawn = draw()
        return shards


def train_and_draw(ranks: Ranks, run: str) -> list[float]:
    """What follows the state in the checkpoint of the stop."""
    progress, storage = Progress(Path(run), writes=ranks.is_first), Drawing()
    random.seed(ranks.rank)
    np.random.seed(ranks.rank)
    torch.manual_seed(ranks.rank)
    state = prepare(Path(run), ranks, progress)
    assert Trainer(state, StopAfter(2, "usr1"), progress, storage).train() == 85
    return storage.drawn


def resume_and_draw(ranks: Ranks, run: str) -> list[float]:
    progress = Progress(Path(run), writes=ranks.is_first)
    draw()
    Trainer(prepare(Path(run), ranks, progress), StopRequest(), progress)
    return draw()


def test_a_resumed_rank_draws_what_it_would_have_drawn(two_ranks: RankPool, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run", 2)
    expected = two_ranks.run(train_and_draw, str(run))
    assert expected[0] != expected[1]
    assert two_ranks.run(resume_and_draw, str(run)) == expected
