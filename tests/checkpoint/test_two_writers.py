"""A job that was given up (its node is unreachable, say) still writes while its successor trains."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkd.checkpoint import save
from alignkd.checkpoint.resume import find_checkpoint
from alignkd.checkpoint.storage import Shards, Storage
from alignkd.distributed.ranks import Ranks
from alignkd.engine.setup import prepare
from alignkd.engine.signals import StopRequest
from alignkd.engine.trainer import Trainer
from alignkd.errors import TakenOverError, TrainingError
from alignkd.run_folder.checkpoints import committed_steps
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.progress import Progress
from tests import tiny
from tests.checkpoint.faulty_storage import FaultyStorage, disk_full
from tests.ranks import RankPool


class GivenUp(Storage):
    """Its writer of step 2 hangs, until the other job has hashed that step; then it writes what it has."""

    def __init__(self) -> None:
        self.goes_on, self.done, self.wrote = threading.Event(), threading.Event(), 0

    def write_files(self, shards: Shards) -> list[Path]:
        if shards.partial.name.startswith("step-2."):
            self.goes_on.wait(120)
        try:
            return super().write_files(shards)
        finally:
            self.done.set()

    def write_file(self, path: Path, state: Any) -> None:
        if self.goes_on.is_set():
            # Not the same bytes: a job on another number of ranks has other shards under the same names.
            state = {"module": None}
            path.parent.mkdir(exist_ok=True)  # a network file system may have kept it for this host
            self.wrote += 1
        super().write_file(path, state)


class Successor(Storage):
    def __init__(self, given_up: GivenUp) -> None:
        self._given_up = given_up

    def flush_and_hash(self, partial: Path, written: list[Path]) -> dict[str, dict[str, Any]]:
        sealed = super().flush_and_hash(partial, written)
        if partial.name.startswith("step-2."):
            self._given_up.goes_on.set()
            assert self._given_up.done.wait(120)
        return sealed


def train_twice(ranks: Ranks, run: str) -> tuple[str, int, int, tuple[int, ...]]:
    """What the first job ends with, how many files it wrote late, the second's code, what is whole then."""
    progress, given_up = Progress(Path(run), writes=ranks.is_first), GivenUp()
    lost = threading.Event()

    class LostInStep3(StopRequest):
        """Read once per step edge."""

        edges = 0

        @property
        def usr1(self) -> bool:
            self.edges += 1
            if self.edges == 3:
                lost.set()
            return False

        @usr1.setter
        def usr1(self, _value: bool) -> None: ...

    message = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "CLOSE_SECONDS", 0.0)  # this process lives on, so the writer may
        try:
            state = prepare(Path(run), ranks, progress)
            Trainer(state, LostInStep3(), progress, given_up, lambda: not lost.is_set()).train()
        except TrainingError as error:
            message = str(error)
    state = prepare(Path(run), ranks, progress)
    code = Trainer(state, StopRequest(), progress, Successor(given_up)).train()
    return message, given_up.wrote, code, find_checkpoint(Path(run), ranks, keep_last=9).verified


def test_late_writes_of_a_job_that_was_given_up_damage_nothing(two_ranks: RankPool, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run", 2, training__epochs=2, checkpoint__keep_last=None)
    for message, wrote, code, verified in two_ranks.run(train_twice, str(run), timeout=400):
        assert "another process has taken over this run" in message
        assert wrote > 0
        assert code == 0
        assert verified == (8, 6, 4, 2)
    assert committed_steps(run) == [8, 6, 4, 2]
    assert len(tiny.metrics_rows(run)) == 8


def train_with(ranks: Ranks, run: str, storage: Storage, is_writer: Callable[[], bool]) -> str:
    """The error that every rank raises."""
    progress = Progress(Path(run), writes=ranks.is_first)
    state = prepare(Path(run), ranks, progress)
    with pytest.raises(TakenOverError) as raised:
        Trainer(state, StopRequest(), progress, storage, is_writer, generation=7).train()
    return str(raised.value)


def start_after_a_takeover(ranks: Ranks, run: str, after_cut: bool) -> str:
    """The run was lost while the engines were built, or while rows were cut (``after_cut``)."""
    answers = iter([after_cut])
    return train_with(ranks, run, Storage(), lambda: next(answers, False))


@pytest.mark.parametrize("after_cut", [False, True])
def test_a_start_that_has_lost_the_run_removes_nothing_of_its_successor_s(
    two_ranks: RankPool, tmp_path: Path, after_cut: bool
) -> None:
    run = tiny.write_run(tmp_path / "run", 2)
    theirs = RunPaths(run).checkpoints / "step-2.8-abc.tmp"  # a save under way
    theirs.mkdir(parents=True)
    RunPaths(run).metrics.write_text('{"step": 1}\n')
    for message in two_ranks.run(start_after_a_takeover, str(run), after_cut):
        assert "another process has taken over this run" in message
    assert theirs.exists()
    assert (RunPaths(run).metrics.read_text() == "") is after_cut


def lose_the_run_in_a_failed_save(ranks: Ranks, run: str) -> str:
    lost = threading.Event()

    def fault() -> None:
        lost.set()
        disk_full()

    return train_with(ranks, run, FaultyStorage("flush", 2, fault), lambda: not lost.is_set())


def test_a_failed_save_is_not_cleared_away_once_the_run_is_lost(two_ranks: RankPool, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run", 2)
    for message in two_ranks.run(lose_the_run_in_a_failed_save, str(run)):
        assert "another process has taken over this run" in message
    (partial,) = RunPaths(run).checkpoints.iterdir()
    assert partial.name.startswith("step-2.7-")  # the generation is in the name
    assert list(partial.iterdir())
