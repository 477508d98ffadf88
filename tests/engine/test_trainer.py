"""What the loop does at the edges of its steps: time, commits, saves, and the rates that it sets."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkd.checkpoint import resume
from alignkd.checkpoint.storage import Shards, Storage
from alignkd.data.batch import Batch
from alignkd.data.loader import WindowLoader
from alignkd.distributed.ranks import Ranks
from alignkd.engine.setup import prepare
from alignkd.engine.signals import StopRequest
from alignkd.engine.step_clock import StepClock
from alignkd.engine.trainer import Trainer
from alignkd.run_folder.checkpoints import committed_steps, read_manifest, step_folder
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.progress import Progress
from tests import tiny
from tests.engine.test_training_run import StopAfter
from tests.ranks import RankPool


def trainer_of(ranks: Ranks, run: str, storage: Storage) -> Trainer:
    progress = Progress(Path(run), writes=ranks.is_first)
    return Trainer(prepare(Path(run), ranks, progress), StopRequest(), progress, storage)


class SlowStorage(Storage):
    """Its save and its commit take an hour each, by a clock that nothing else moves but the data."""

    def __init__(self) -> None:
        self.now = 0.0

    def snapshot_rank(self, engine: Any, partial: Path, rank: int, *, copies: bool) -> Shards:
        self.now += 3600
        return super().snapshot_rank(engine, partial, rank, copies=copies)

    def publish(self, partial: Path, final: Path) -> None:
        self.now += 3600
        super().publish(partial, final)


def train_with_slow_saves(ranks: Ranks, run: str) -> int:
    storage = SlowStorage()
    trainer = trainer_of(ranks, run, storage)
    trainer.clock = StepClock(lambda: storage.now)
    windows = trainer.windows

    def slow_windows() -> Iterator[list[Batch]]:
        for window in windows:
            storage.now += trainer.step + 1
            yield window
            while not trainer.saver.written:  # each commit is polled, at the edge of the next step
                time.sleep(0.01)

    trainer.windows = slow_windows()
    return trainer.train()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_saves_and_commits_are_not_step_time_but_the_wait_for_data_is(
    one_rank: RankPool, tmp_path: Path, asynchronous: bool
) -> None:
    run = tiny.write_run(tmp_path / "run", 1, checkpoint__asynchronous=asynchronous)
    assert one_rank.run(train_with_slow_saves, str(run)) == [0]
    rows = tiny.metrics_rows(run)
    assert [row["step_seconds"] for row in rows] == [1.0, 2.0, 3.0, 4.0]
    assert [row["data_wait_share"] for row in rows] == [1.0] * 4
    assert [row["samples_per_second"] for row in rows] == [8 / 1, 8 / 2, 8 / 3, 8 / 4]
    assert committed_steps(run) == [4, 2]
    slowest = [read_manifest(step_folder(run, step))["step_seconds"] for step in (2, 4)]
    assert slowest == [2.0, 4.0]  # each since the save before


class CommitLog(Storage):
    """At which optimizer step each checkpoint is committed."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.committed: dict[str, int] = {}

    def mark(self, final: Path) -> None:
        super().mark(final)
        assert self.trainer is not None
        self.committed[final.name] = self.trainer.step


def train_with_a_commit_log(ranks: Ranks, run: str) -> dict[str, int]:
    """Every rank's save is written by the time it asks for its next window."""
    storage = CommitLog()
    trainer = storage.trainer = trainer_of(ranks, run, storage)
    windows = WindowLoader.__iter__

    def once_written(loader: WindowLoader) -> Iterator[list[Batch]]:
        for window in windows(loader):
            yield window
            while not trainer.saver.written:
                time.sleep(0.01)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WindowLoader, "__iter__", once_written)
        trainer.windows = iter(trainer.state.loader)
        assert trainer.train() == 0
    return storage.committed


def test_a_save_is_committed_before_the_next_step_once_all_ranks_have_written_it(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    run = tiny.write_run(tmp_path / "run", 2, training__epochs=2, checkpoint__every=3)
    committed, nothing = two_ranks.run(train_with_a_commit_log, str(run))
    assert committed == {"step-3": 3, "step-6": 6, "step-8": 8}
    assert nothing == {}  # rank 0 commits


def stop_after_two_steps(ranks: Ranks, run: str) -> int:
    progress = Progress(Path(run), writes=ranks.is_first)
    return Trainer(prepare(Path(run), ranks, progress), StopAfter(2, "usr1"), progress).train()


def test_a_step_whose_save_is_in_flight_at_a_stop_is_not_saved_again(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    run = tiny.write_run(tmp_path / "run", 2, checkpoint__every=2)
    assert two_ranks.run(stop_after_two_steps, str(run)) == [85, 85]
    assert {path.name for path in RunPaths(run).checkpoints.iterdir()} == {"step-2", "latest"}
    assert json.loads(RunPaths(run).result.read_text())["saves"]["committed"] == 1


RATES = {"learning_rate": 1e-3, "projector_learning_rate": 2e-3, "adapter_learning_rate": 4e-3}


def train_and_watch_the_optimizer(ranks: Ranks, run: str) -> list[list[float]]:
    """The learning rates with which the optimizer was called, step by step."""
    trainer = trainer_of(ranks, run, Storage())
    engine, used = trainer.state.engine, []
    step = engine.step

    def watched() -> None:
        if engine.is_gradient_accumulation_boundary():
            used.append(sorted({group["lr"] for group in engine.optimizer.param_groups}))
        step()

    engine.step = watched
    assert trainer.train() == 0
    return used


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_rows_have_the_learning_rates_that_the_optimizer_used(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    changes = {f"training__{name}": rate for name, rate in RATES.items()}
    run = tiny.write_run(
        tmp_path / "run", 2, student__zero_stage=stage, training__warmup_ratio=0.5, **changes
    )
    used = two_ranks.run(train_and_watch_the_optimizer, str(run))[0]
    rows = tiny.metrics_rows(run)
    assert [[row[name] for name in RATES] for row in rows] == used
    # Two steps of warm-up, then half a cosine.
    assert used == [[rate * factor for rate in RATES.values()] for factor in (0.5, 1.0, 1.0, 0.5)]


def train_and_watch_the_loss(ranks: Ranks, run: str) -> list[float]:
    """What DeepSpeed minimised in each step, over all ranks."""
    trainer = trainer_of(ranks, run, Storage())
    engine, steps = trainer.state.engine, []
    backward, step = engine.backward, engine.step
    losses: list[torch.Tensor] = []

    def watched_backward(loss: torch.Tensor) -> None:
        losses.append(loss.detach())
        backward(loss)

    def watched_step() -> None:
        if engine.is_gradient_accumulation_boundary():
            steps.append(torch.stack(losses).sum() / engine.gradient_accumulation_steps())
            losses.clear()
        step()

    engine.backward, engine.step = watched_backward, watched_step
    assert trainer.train() == 0
    minimised = torch.stack(steps)
    torch.distributed.all_reduce(minimised)
    mean: list[float] = (minimised / ranks.world_size).tolist()
    return mean


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_rows_have_the_loss_that_was_minimised(two_ranks: RankPool, tmp_path: Path, stage: int) -> None:
    run = tiny.write_run(
        tmp_path / "run",
        2,
        student__zero_stage=stage,
        distillation__weights={"attention": 900.0, "vision": 3.0, "logits": 0.7},
        distillation__vision_focus_weight=0.37,
    )
    minimised = two_ranks.run(train_and_watch_the_loss, str(run))[0]
    rows = tiny.metrics_rows(run)
    assert [row["loss"] for row in rows] == pytest.approx(minimised, rel=1e-5)
    for row in rows:
        vision = row["vision_all"] + 0.37 * row["vision_focus"]
        terms = row["ce"] + 0.7 * row["reverse_kl"] + 900.0 * row["attention"] + 3.0 * vision
        assert row["loss"] == pytest.approx(terms, rel=1e-5)


def test_what_is_not_trained_has_no_learning_rate(one_rank: RankPool, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run", 1, distillation__enabled=False, training__max_steps=1)
    one_rank.run(train_and_watch_the_optimizer, str(run))
    (row,) = tiny.metrics_rows(run)
    assert (row["learning_rate"], row["adapter_learning_rate"]) == (1e-3, 0.0)


class OlderVersion(Storage):
    """Parameter groups did not always have a ``rate_name``."""

    def snapshot_rank(self, engine: Any, partial: Path, rank: int, *, copies: bool) -> Shards:
        groups = engine.optimizer.param_groups
        names = [group.pop("rate_name") for group in groups]
        try:
            return super().snapshot_rank(engine, partial, rank, copies=copies)
        finally:
            for group, name in zip(groups, names, strict=True):
                group["rate_name"] = name


def train(ranks: Ranks, run: str, storage: Storage) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "PATIENCE_SECONDS", 0.2)
        return trainer_of(ranks, run, storage).train()


def test_a_checkpoint_of_an_older_version_is_resumed_with_the_same_rates(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    run = tiny.write_run(tmp_path / "run", 2, student__zero_stage=2)
    assert two_ranks.run(train, str(run), OlderVersion()) == [0, 0]
    before = tiny.metrics_rows(run)
    shutil.rmtree(RunPaths(run).checkpoints / "step-4")
    assert two_ranks.run(train, str(run), Storage()) == [0, 0]
    for row, expected in zip(tiny.metrics_rows(run), before, strict=True):
        assert [row[name] for name in RATES] == [expected[name] for name in RATES]
        assert row["learning_rate"] > 0
