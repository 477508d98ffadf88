"""The phases that the heartbeat shows while a save is committed: the watch for hangs gives each its time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from alignkd.checkpoint.storage import Storage
from alignkd.data.batch import Batch
from alignkd.distributed.ranks import Ranks
from alignkd.engine.optimizer_step import StepInfo
from alignkd.engine.setup import prepare
from alignkd.engine.signals import StopRequest
from alignkd.engine.trainer import Trainer
from alignkd.errors import TrainingError
from alignkd.run_folder.heartbeat import DATA, TRAINING, Heartbeat
from alignkd.run_folder.progress import Progress
from tests import tiny
from tests.engine.test_training_run import StopAfter
from tests.ranks import RankPool


class Phases(Heartbeat):
    """All of them with their steps, in order; its thread never starts."""

    def __init__(self, run: Path) -> None:
        super().__init__(run, 0, interval=10.0)
        self.entered: list[tuple[str, int | None]] = []

    def enter(self, phase: str, step: int | None = None, done: int | None = None) -> None:
        if self.entered[-1:] != [(phase, step)]:
            self.entered.append((phase, step))


class Commits(Storage):
    """The phase in which each checkpoint is committed."""

    def __init__(self, phases: Phases) -> None:
        self.phases = phases
        self.of: dict[str, str] = {}

    def mark(self, final: Path) -> None:
        super().mark(final)
        self.of[final.name] = self.phases.entered[-1][0]


def trainer_of(ranks: Ranks, run: str, stop: StopRequest | None = None) -> tuple[Trainer, Commits]:
    phases = Phases(Path(run))
    progress = Progress(Path(run), writes=ranks.is_first, heartbeat=phases)
    commits = Commits(phases)
    return Trainer(prepare(Path(run), ranks, progress), stop or StopRequest(), progress, commits), commits


def train_to_the_end(ranks: Ranks, run: str) -> tuple[dict[str, str], list[tuple[str, int | None]]]:
    trainer, commits = trainer_of(ranks, run)
    windows = trainer.windows

    def once_written() -> Iterator[list[Batch]]:
        for window in windows:
            while not trainer.saver.written:  # so that the commit is at the edge of the next step
                time.sleep(0.01)
            yield window

    trainer.windows = once_written()
    assert trainer.train() == 0
    return commits.of, commits.phases.entered


def test_a_save_is_committed_between_two_steps_as_a_save(one_rank: RankPool, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run", 1, checkpoint__every=2)
    ((of, entered),) = one_rank.run(train_to_the_end, str(run))
    assert of == {"step-2": "saving", "step-4": "saving"}
    begun = entered.index(("saving", 2))
    # The third step is in a step's phase again, from its beginning.
    assert [phase for phase, step in entered[begun:] if step == 2] == [
        "saving",
        DATA,
        TRAINING,
        "saving",
        TRAINING,
    ]


def train_to_a_stop(ranks: Ranks, run: str) -> tuple[int, dict[str, str]]:
    trainer, commits = trainer_of(ranks, run, StopAfter(2, "usr1"))
    return trainer.train(), commits.of


def test_a_stop_waits_for_the_save_in_flight_as_a_save(one_rank: RankPool, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run", 1, checkpoint__every=2)
    assert one_rank.run(train_to_a_stop, str(run)) == [(85, {"step-2": "saving"})]


def train_to_a_failure(ranks: Ranks, run: str) -> tuple[str, dict[str, str]]:
    trainer, commits = trainer_of(ranks, run)
    next_window = trainer._next_window

    def failing() -> tuple[list[Batch], StepInfo]:
        found = next_window()
        if trainer.step == 2:
            raise TrainingError("the loss is not finite")
        return found

    trainer._next_window = failing  # type: ignore[method-assign]
    try:
        trainer.train()
    except TrainingError as error:
        return str(error), commits.of
    return "", {}


def test_a_failure_waits_for_the_save_in_flight_as_a_save(one_rank: RankPool, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run", 1, checkpoint__every=2)
    assert one_rank.run(train_to_a_failure, str(run)) == [("the loss is not finite", {"step-2": "saving"})]
