"""How a run ends after a failure at its very end or on one rank: all ranks know of it, nothing is lost."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from alignkd.checkpoint.storage import Storage
from alignkd.data.loader import WindowLoader
from alignkd.distributed.ranks import Ranks
from alignkd.engine import finish, trainer
from alignkd.engine.metrics import Metrics
from alignkd.engine.setup import prepare
from alignkd.engine.signals import StopRequest
from alignkd.engine.trainer import Trainer
from alignkd.errors import AlignkdError, UserError
from alignkd.run_folder.checkpoints import committed_steps
from alignkd.run_folder.progress import Progress
from tests import tiny
from tests.checkpoint.faulty_storage import disk_full
from tests.engine.test_training_run import StopAfter, same_but_for_times
from tests.needs import small_disk
from tests.ranks import RankPool

Answer = tuple[int | str, str]  # exit code or name of the error, its message


def train_with(
    ranks: Ranks,
    run: str,
    storage: Storage,
    stop: StopRequest | None = None,
    is_writer: Callable[[], bool] = lambda: True,
) -> Answer:
    progress = Progress(Path(run), writes=ranks.is_first)
    try:
        state = prepare(Path(run), ranks, progress)
        return Trainer(state, stop or StopRequest(), progress, storage, is_writer).train(), ""
    except AlignkdError as error:
        return type(error).__name__, str(error)


class FullAtTheEnd(Storage):
    """The disk, mounted at ``disk``, has room for the last checkpoint and little else."""

    def __init__(self, disk: Path) -> None:
        self._disk = disk

    def write_latest(self, final: Path) -> None:
        super().write_latest(final)
        if final.name == "step-4":
            used = shutil.disk_usage(self._disk).used
            size = f"remount,size={used + (256 << 10)}"
            subprocess.run(["mount", "-o", size, str(self._disk)], check=True)


def train_on_a_disk_that_fills_up(ranks: Ranks, run: str, disk: str) -> Answer:
    return train_with(ranks, run, FullAtTheEnd(Path(disk)))


def train_normally(ranks: Ranks, run: str) -> Answer:
    return train_with(ranks, run, Storage())


def test_a_disk_that_is_full_at_the_end_fails_all_ranks_and_costs_only_the_export(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk, "1g"):
        run = tiny.write_run(disk / "run", 2)
        for kind, message in two_ranks.run(train_on_a_disk_that_fills_up, str(run), str(disk)):
            assert kind == "FileSystemError"
            assert "No space left on device" in message
            assert "continues from step 4" in message
        assert committed_steps(run) == [4, 2]
        assert not (run / "student").exists()
        assert not (run / "student.tmp").exists()  # half a student would only take room
        assert not (run / "result.json").exists()
        rows = (run / "metrics.jsonl").read_text()
        subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
        assert two_ranks.run(train_normally, str(run)) == [(0, ""), (0, "")]
        assert (run / "metrics.jsonl").read_text() == rows  # down to the times: no step was repeated
        assert load_file(run / "student" / "model.safetensors")
        assert load_file(run / "adapters.safetensors")
        result = json.loads((run / "result.json").read_text())
        assert (result["status"], result["saves"]["committed"]) == ("done", 0)


def train_without_room_for(ranks: Ranks, run: str, name: str, stop_after: int | None) -> Answer:
    """``name``: a function of ``finish`` that writes on rank 0."""
    stop = None if stop_after is None else StopAfter(stop_after, "usr1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, name, lambda *_: disk_full())
        return train_with(ranks, run, Storage(), stop)


def export_after_a_takeover(ranks: Ranks, run: str) -> Answer:
    """All steps are done, and another process has taken over the run since the start."""
    at_the_start = iter([True, True])  # cutting rows, removing leftovers
    return train_with(ranks, run, Storage(), is_writer=lambda: next(at_the_start, False))


def test_without_room_for_the_result_a_complete_run_fails_but_a_stopped_one_does_not(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    run = tiny.write_run(tmp_path / "run", 2)
    # It is saved: the exit code tells the launcher that it may be requeued.
    assert two_ranks.run(train_without_room_for, str(run), "write_result", 3) == [(85, "")] * 2
    assert committed_steps(run) == [3, 2]
    for kind, message in two_ranks.run(train_without_room_for, str(run), "write_result", None):
        assert kind == "FileSystemError"
        assert "No space left on device" in message
    assert not (run / "result.json").exists()
    assert committed_steps(run) == [4, 3, 2]
    shutil.rmtree(run / "student")
    assert [kind for kind, _ in two_ranks.run(export_after_a_takeover, str(run))] == ["TakenOverError"] * 2
    assert not (run / "student").exists()


class NoRoom(Storage):
    def begin(self, partial: Path, final: Path, needed_bytes: int) -> None:
        disk_full()


def stop_without_room(ranks: Ranks, run: str) -> Answer:
    return train_with(ranks, run, NoRoom(), StopAfter(3, "usr1"))


def test_a_stop_whose_save_fails_is_an_error_and_not_a_saved_stop(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    run = tiny.write_run(tmp_path / "run", 2)
    for kind, message in two_ranks.run(stop_without_room, str(run)):
        assert kind == "TrainingError"
        assert "stopped at step 3, but it could not be saved; the newest checkpoint is of step 0" in message
    assert not (run / "result.json").exists()


def train_without_room_to_cut(ranks: Ranks, run: str) -> Answer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "cut_rows_after", lambda *_: disk_full())
        return train_with(ranks, run, Storage())


def test_without_room_to_cut_the_metrics_rows_all_ranks_fail_at_the_start(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    run = tiny.write_run(tmp_path / "run", 2)
    for kind, message in two_ranks.run(train_without_room_to_cut, str(run)):
        assert kind == "FileSystemError"
        assert "No space left on device" in message


class Slow(Storage):
    """Still writing when the next step is done."""

    def write_file(self, path: Path, state: object) -> None:
        time.sleep(4)
        super().write_file(path, state)


def train_until_rank_1_has_no_data(ranks: Ranks, run: str, error: Exception) -> Answer:
    windows = WindowLoader.__iter__

    def breaking(loader: WindowLoader) -> Iterator[list[Any]]:
        of_all_steps = windows(loader)
        yield next(of_all_steps)
        if ranks.rank == 1:
            raise error
        yield from of_all_steps

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WindowLoader, "__iter__", breaking)
        return train_with(ranks, run, Slow())


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("v1.json: entry 7: no such image"), "UserError"),
        (RuntimeError("DataLoader worker is killed"), "TrainingError"),
    ],
)
def test_bad_data_on_one_rank_ends_all_ranks_after_the_save_in_flight(
    two_ranks: RankPool, tmp_path: Path, error: Exception, kind: str
) -> None:
    run = tiny.write_run(tmp_path / "run", 2, checkpoint__every=1)
    first, second = two_ranks.run(train_until_rank_1_has_no_data, str(run), error)
    assert (first[0], second[0]) == (kind, kind)
    assert str(error) in second[1]
    assert first[1] == f"rank 1: {second[1]}"
    assert committed_steps(run) == [1]  # it was still being written


def images_of_its_own(run: Path) -> dict[str, Any]:
    """A change for ``write_run``: the images lie where a test can remove them."""
    images = run.parent / "images"
    images.mkdir()
    for path in tiny.FOLDER.glob("image_*.png"):
        shutil.copy(path, images)
    sources = [
        {"file": str(run / f"{template}.json"), "template": template, "image_folder": str(images)}
        for template in ("v1", "plain")
    ]
    return {"data__sources": sources}


def train_until_images_vanish(ranks: Ranks, run: str, steps: int) -> Answer:
    """After ``steps`` optimizer steps."""
    windows = WindowLoader.__iter__

    def vanishing(loader: WindowLoader) -> Iterator[list[Any]]:
        for number, window in enumerate(windows(loader), start=1):
            yield window
            if number == steps:
                if ranks.is_first:
                    for path in (Path(run).parent / "images").glob("image_*.png"):
                        path.rename(path.with_suffix(".gone"))
                ranks.barrier()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WindowLoader, "__iter__", vanishing)
        return train_with(ranks, run, Storage())


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_bad_sample_costs_no_step_since_the_state_before_it_is_saved(
    two_ranks: RankPool, tmp_path: Path, asynchronous: bool
) -> None:
    settings = {"checkpoint__every": 500, "checkpoint__asynchronous": asynchronous}
    whole = tiny.write_run(tmp_path / "whole", 2, **settings)
    assert two_ranks.run(train_normally, str(whole)) == [(0, "")] * 2
    run = tmp_path / "run"
    tiny.write_run(run, 2, **settings, **images_of_its_own(run))
    for kind, message in two_ranks.run(train_until_images_vanish, str(run), 3):
        assert kind == "UserError"
        assert "image_" in message
    assert committed_steps(run) == [3]
    assert [row["step"] for row in tiny.metrics_rows(run)] == [1, 2, 3]
    # Nothing was trained since, so a second start that fails at once has nothing to save.
    before = (run / "checkpoints" / "step-3" / "manifest.json").stat().st_mtime_ns
    assert [kind for kind, _ in two_ranks.run(train_normally, str(run))] == ["UserError"] * 2
    assert (run / "checkpoints" / "step-3" / "manifest.json").stat().st_mtime_ns == before
    for path in (tmp_path / "images").glob("image_*.gone"):
        path.rename(path.with_suffix(".png"))
    assert two_ranks.run(train_normally, str(run)) == [(0, "")] * 2
    same_but_for_times(run, whole)


def train_until_a_loader_and_the_job_are_killed(ranks: Ranks, run: str, lost: bool) -> Answer:
    """At the same step edge; ``lost``: another process has taken over the run by then."""
    stop = StopAfter(1, "term") if ranks.rank == 1 else StopRequest()
    windows, killed = WindowLoader.__iter__, threading.Event()

    def breaking(loader: WindowLoader) -> Iterator[list[Any]]:
        yield next(windows(loader))
        killed.set()
        raise RuntimeError("DataLoader worker is killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WindowLoader, "__iter__", breaking)
        return train_with(ranks, run, Storage(), stop, lambda: not (lost and killed.is_set()))


def test_a_stop_keeps_its_save_when_a_loader_process_dies_at_the_same_edge(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    """Slurm's SIGTERM may go to every process of a job, loader processes included."""
    run = tiny.write_run(tmp_path / "run", 2, checkpoint__every=500)
    assert two_ranks.run(train_until_a_loader_and_the_job_are_killed, str(run), False) == [(86, "")] * 2
    assert committed_steps(run) == [1]
    lost = tiny.write_run(tmp_path / "lost", 2, checkpoint__every=500)
    answers = two_ranks.run(train_until_a_loader_and_the_job_are_killed, str(lost), True)
    assert [kind for kind, _ in answers] == ["TakenOverError"] * 2
    assert committed_steps(lost) == []


def train_until_the_last_loss_and_the_next_sample_are_bad(ranks: Ranks, run: str) -> Answer:
    complete = Metrics._complete

    def broken(metrics: Metrics, pending: Any) -> dict[str, Any]:
        row = complete(metrics, pending)
        return row | {"loss": math.nan} if row["step"] == 3 else row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metrics, "_complete", broken)
        return train_until_images_vanish(ranks, run, 3)


def test_a_state_with_a_loss_that_is_not_finite_is_not_saved_before_a_failure(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    tiny.write_run(run, 2, checkpoint__every=500, **images_of_its_own(run))
    for kind, message in two_ranks.run(train_until_the_last_loss_and_the_next_sample_are_bad, str(run)):
        assert kind == "TrainingError"
        assert "step 3: the loss is not finite" in message
    assert committed_steps(run) == []
