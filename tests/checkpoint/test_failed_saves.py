"""A save that fails on any rank in any phase: all agree, nothing incomplete is left, training continues."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkd.checkpoint import commit, resume, save
from alignkd.checkpoint.storage import Storage
from alignkd.distributed.ranks import Ranks
from alignkd.engine.evaluation import Evaluations
from alignkd.engine.metrics import Metrics
from alignkd.engine.setup import prepare
from alignkd.engine.signals import StopRequest
from alignkd.engine.trainer import Trainer
from alignkd.errors import AlignkdError
from alignkd.run_folder.checkpoints import committed_steps
from alignkd.run_folder.metrics import MetricsFile
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.progress import Progress
from tests import tiny
from tests.checkpoint.faulty_storage import PHASES, FaultyStorage, disk_full
from tests.needs import small_disk
from tests.ranks import RankPool

ON_EVERY_RANK = ("snapshot", "between", "shards", "flush")


def train_with_fault(ranks: Ranks, run: str, phase: str, rank: int, steps: list[int]) -> int | str:
    storage = Faults(phase, steps) if ranks.rank == rank else Storage()
    return train_with(ranks, run, storage)


def train_with(ranks: Ranks, run: str, storage: Storage) -> int | str:
    """Exit code, or the message of an error that every rank raises."""
    progress = Progress(Path(run), writes=ranks.is_first)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resume, "PATIENCE_SECONDS", 0.2)
            state = prepare(Path(run), ranks, progress)
        return Trainer(state, StopRequest(), progress, storage).train()
    except AlignkdError as error:
        return str(error)


class Faults(FaultyStorage):
    def __init__(self, phase: str, steps: list[int]) -> None:
        super().__init__(phase, steps[0], disk_full)
        self._steps = steps

    def _at(self, phase: str) -> None:
        if phase == self._phase and self._saving in self._steps:
            self._fault()


@pytest.mark.parametrize(
    ("phase", "rank"),
    [(phase, rank) for phase in PHASES[:8] for rank in ((0, 1) if phase in ON_EVERY_RANK else (0,))],
)
def test_training_continues_after_a_failed_save_and_keeps_the_older_checkpoints(
    two_ranks: RankPool, tmp_path: Path, phase: str, rank: int
) -> None:
    run = tiny.write_run(
        tmp_path / "run", 2, checkpoint__every=1, checkpoint__asynchronous=phase not in ("snapshot", "flush")
    )
    assert two_ranks.run(train_with_fault, str(run), phase, rank, [2]) == [0, 0]
    assert committed_steps(run) == [4, 3, 1]
    names = {path.name for path in RunPaths(run).checkpoints.iterdir()}
    assert names == {"step-1", "step-3", "step-4", "latest"}
    assert (RunPaths(run).checkpoints / "latest").read_text() == "step-4"
    assert len(tiny.metrics_rows(run)) == 4
    saves = json.loads(RunPaths(run).result.read_text())["saves"]
    assert (saves["committed"], saves["failed"]) == (3, 1)


def train_while_rows_do_not_fit(ranks: Ranks, run: str) -> int | str:
    """The disk takes no metrics row from step 2 to the commit of step 3's checkpoint."""
    write_rows, refused = MetricsFile._write_rows, []

    def full(file: MetricsFile) -> None:
        if file._unwritten and json.loads(file._unwritten[0])["step"] == 2 and len(refused) < 4:
            refused.append(1)
            disk_full()
        write_rows(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsFile, "_write_rows", full)
        return train_with(ranks, run, Storage())


def test_no_checkpoint_counts_before_the_rows_up_to_it_are_written(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    run = tiny.write_run(tmp_path / "run", 2, checkpoint__every=1, checkpoint__asynchronous=False)
    assert two_ranks.run(train_while_rows_do_not_fit, str(run)) == [0, 0]
    # Two rows and two commits were refused.
    assert committed_steps(run) == [4, 1]
    assert [row["step"] for row in tiny.metrics_rows(run)] == [1, 2, 3, 4]


class MountedFull(Storage):
    """On a file system that has room for a part of a checkpoint, until the save of step 3."""

    def begin(self, partial: Path, final: Path, needed_bytes: int) -> None:
        if final.name == "step-3":
            subprocess.run(["mount", "-o", "remount,size=1g", str(partial.parent)], check=True)
        super().begin(partial, final, needed_bytes)


def train_on_a_full_disk(ranks: Ranks, run: str) -> int | str:
    return train_with(ranks, run, MountedFull())


@pytest.mark.parametrize("asynchronous", [True, False])
def test_saves_succeed_again_once_a_full_disk_has_room(
    two_ranks: RankPool, tmp_path: Path, asynchronous: bool
) -> None:
    run = tiny.write_run(tmp_path / "run", 2, checkpoint__every=1, checkpoint__asynchronous=asynchronous)
    folder = RunPaths(run).checkpoints
    folder.mkdir()
    with small_disk(folder, "2m"):
        assert two_ranks.run(train_on_a_full_disk, str(run)) == [0, 0]
        assert committed_steps(run) == [4, 3]
        assert {path.name for path in folder.iterdir()} == {"step-3", "step-4", "latest"}


class Hung(Storage):
    """The file system hangs for a while in the save of step 2."""

    def flush_and_hash(self, partial: Path, written: list[Path]) -> dict[str, dict[str, Any]]:
        if partial.name.startswith("step-2."):
            time.sleep(8)
        return super().flush_and_hash(partial, written)


def train_while_a_disk_hangs(ranks: Ranks, run: str) -> int | str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "WRITE_SECONDS", 2.0)
        return train_with(ranks, run, Hung() if ranks.rank == 1 else Storage())


def test_a_file_system_that_hangs_on_one_rank_costs_one_save(two_ranks: RankPool, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run", 2, checkpoint__every=1)
    assert two_ranks.run(train_while_a_disk_hangs, str(run)) == [0, 0]
    assert committed_steps(run) == [4, 3, 1]
    assert "rank 1: not written within 2 s; does the file system hang?" in two_ranks.log(0)


class OwnMount(Storage):
    """This rank has another file system where the others have the checkpoints."""

    def flush_and_hash(self, partial: Path, written: list[Path]) -> dict[str, dict[str, Any]]:
        entries = super().flush_and_hash(partial, written)
        own = partial.parent.parent / "own"
        own.mkdir(exist_ok=True)
        for path in written:
            path.rename(own / path.name)
        return entries


def train_on_a_mount_of_its_own(ranks: Ranks, run: str) -> int | str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit, "PATIENCE_SECONDS", 0.2)
        return train_with(ranks, run, OwnMount() if ranks.rank == 1 else Storage())


def test_a_rank_that_writes_where_rank_0_does_not_see_it_commits_nothing(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    run = tiny.write_run(tmp_path / "run", 2, checkpoint__every=1, checkpoint__max_failures=2)
    for message in two_ranks.run(train_on_a_mount_of_its_own, str(run)):
        assert "2 checkpoints in a row could not be written" in str(message)
        assert "rank 0 does not see it" in str(message)
        assert "that all ranks share" in str(message)
    assert committed_steps(run) == []


def test_too_many_failures_in_a_row_stop_the_run(two_ranks: RankPool, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run", 2, checkpoint__every=1, checkpoint__max_failures=2)
    for message in two_ranks.run(train_with_fault, str(run), "flush", 1, [2, 3]):
        assert "2 checkpoints in a row could not be written" in str(message)
        assert "rank 1" in str(message)
        assert "No space left on device" in str(message)
    assert committed_steps(run) == [1]


class Slow(Storage):
    """Still writes when the next step is over."""

    def write_file(self, path: Path, state: object) -> None:
        time.sleep(4)
        super().write_file(path, state)


def train_until_the_loss_breaks(ranks: Ranks, run: str) -> int | str:
    """At step 2, while the save of step 1 is in flight."""
    complete = Metrics._complete

    def broken(metrics: Metrics, pending: Any) -> dict[str, Any]:
        row = complete(metrics, pending)
        return row | {"loss": math.nan} if row["step"] == 2 else row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metrics, "_complete", broken)
        return train_with(ranks, run, Slow())


def test_a_loss_that_is_not_finite_does_not_lose_the_save_in_flight(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    run = tiny.write_run(tmp_path / "run", 2, checkpoint__every=1)
    for message in two_ranks.run(train_until_the_loss_breaks, str(run)):
        assert "step 2: the loss is not finite" in str(message)
    assert committed_steps(run) == [1]


def train_until_taken_over(ranks: Ranks, run: str) -> int | str:
    """The lock is another's when the save of step 2 has begun."""
    progress = Progress(Path(run), writes=ranks.is_first)
    folder = RunPaths(Path(run)).checkpoints
    try:
        state = prepare(Path(run), ranks, progress)
        return Trainer(
            state, StopRequest(), progress, is_writer=lambda: not list(folder.glob("step-2.*.tmp"))
        ).train()
    except AlignkdError as error:
        return str(error)


def test_a_run_that_another_job_has_taken_over_is_not_written_to(two_ranks: RankPool, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run", 2, checkpoint__every=1)
    for message in two_ranks.run(train_until_taken_over, str(run)):
        assert "another process has taken over this run" in str(message)
    assert committed_steps(run) == [1]
    assert list(RunPaths(run).checkpoints.glob("step-2.*.tmp"))  # it might be the other's


def train_until_lost_in_an_evaluation(ranks: Ranks, run: str) -> int | str:
    progress, lost = Progress(Path(run), writes=ranks.is_first), list[int]()

    def losing(_: object, step: int, *__: object) -> dict[str, float]:
        lost.append(step)
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluations, "evaluate", losing)
        try:
            state = prepare(Path(run), ranks, progress)
            return Trainer(state, StopRequest(), progress, is_writer=lambda: not lost).train()
        except AlignkdError as error:
            return str(error)


def test_a_run_that_is_lost_during_an_evaluation_gets_no_row_and_no_save(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    source = {"file": str(tmp_path / "run/v1.json"), "template": "v1", "image_folder": str(tiny.FOLDER)}
    run = tiny.write_run(tmp_path / "run", 2, evaluation={"every": 2, "sources": [source]})
    for message in two_ranks.run(train_until_lost_in_an_evaluation, str(run)):
        assert "another process has taken over this run" in str(message)
    assert committed_steps(run) == []
    assert [row["step"] for row in tiny.metrics_rows(run)] == [1]


def test_retention_keeps_what_was_asked_for(two_ranks: RankPool, tmp_path: Path) -> None:
    run = tiny.write_run(
        tmp_path / "run",
        2,
        checkpoint__every=1,
        checkpoint__keep_last=1,
        checkpoint__keep_every=2,
        training__epochs=2,
    )
    assert two_ranks.run(train_with_fault, str(run), "latest", 0, [99]) == [0, 0]
    assert committed_steps(run) == [8, 6, 4, 2]


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("training__learning_rate", 2e-3, "training.learning_rate"),
        ("distillation__temperature", 2.0, "temperature"),
    ],
)
def test_a_changed_configuration_is_refused_until_it_is_allowed(
    two_ranks: RankPool, tmp_path: Path, key: str, value: float, named: str
) -> None:
    run = tiny.write_run(tmp_path / "run", 2)
    assert two_ranks.run(train_with_fault, str(run), "latest", 0, [99]) == [0, 0]
    other = tiny.write_run(tmp_path / "other", 2, **{key: value})
    RunPaths(run).config.write_text(RunPaths(other).config.read_text())
    for message in two_ranks.run(train_with_fault, str(run), "latest", 0, [99]):
        assert named in str(message)
        assert "--allow-change" in str(message)
    RunPaths(run).allowed_changes.write_text(f'["{key.replace("__", ".")}"]')
    shutil.rmtree(RunPaths(run).checkpoints / "step-4")
    assert two_ranks.run(train_with_fault, str(run), "latest", 0, [99]) == [0, 0]
    if named == "training.learning_rate":
        # Not the 1e-3 of the optimizer state in the checkpoint.
        assert two_ranks.run(saved_rates, str(run))[0] == {2e-3}


def saved_rates(_ranks: Ranks, run: str) -> set[float]:
    """Peak learning rates in the newest checkpoint's optimizer state."""
    path = RunPaths(Path(run)).checkpoints / "step-4" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    state = torch.load(path, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]
    groups = state["param_groups"] if isinstance(state, dict) else state
    return {group["base_rate"] for group in groups}


def test_changed_data_are_refused(two_ranks: RankPool, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run", 2)
    assert two_ranks.run(train_with_fault, str(run), "latest", 0, [99]) == [0, 0]
    (run / "plain.json").write_text((run / "plain.json").read_text().replace("red circle", "red square"))
    assert all("data" in str(m) for m in two_ranks.run(train_with_fault, str(run), "latest", 0, [99]))
