"""When a save may begin and when it may count, on one rank and without an engine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkd.checkpoint import save
from alignkd.checkpoint.resume import CheckpointSearch
from alignkd.checkpoint.save import SPACE_MARGIN, CheckpointSaver
from alignkd.checkpoint.storage import Shards, Storage
from alignkd.config.checkpoint_section import CheckpointSection
from alignkd.distributed.ranks import Ranks
from alignkd.errors import TakenOverError, TrainingError
from alignkd.run_folder.checkpoints import committed_steps
from alignkd.run_folder.verification import verify
from tests.checkpoint.faulty_storage import disk_full
from tests.ranks import RankPool

FILE_BYTES = 1000


class OneFile(Storage):
    """Its engine has one file. ``needed``: the room that each save asked for; ``full``: steps that fail."""

    def __init__(self, full: tuple[int, ...] = ()) -> None:
        self.needed: list[int] = []
        self._full = full

    def begin(self, partial: Path, final: Path, needed_bytes: int) -> None:
        self.needed.append(needed_bytes)
        super().begin(partial, final, needed_bytes)
        if int(final.name.removeprefix("step-")) in self._full:
            disk_full()

    def snapshot_rank(self, engine: Any, partial: Path, rank: int, *, copies: bool) -> Shards:
        return Shards(partial, rank, [(partial / "shard.pt", b"x" * FILE_BYTES)], [], {})

    def write_file(self, path: Path, state: Any) -> None:
        path.write_bytes(state)


def saver_of(
    ranks: Ranks, run: str, storage: Storage, is_writer: Callable[[], bool] = lambda: True, failures: int = 3
) -> CheckpointSaver:
    section = CheckpointSection(max_failures=failures, keep_last=None)  # type: ignore[call-arg]
    return CheckpointSaver(
        Path(run), section, ranks, storage, CheckpointSearch(None, (), ()), is_writer=is_writer
    )


def needed_bytes(ranks: Ranks, run: str) -> tuple[list[int], int]:
    storage = OneFile()
    saver = saver_of(ranks, run, storage)
    for step in (1, 2, 3):
        saver.save(None, step, {}, wait=True)
    return storage.needed, saver.totals.bytes


def test_a_save_asks_for_the_room_of_the_last_one(one_rank: RankPool, tmp_path: Path) -> None:
    ((needed, size),) = one_rank.run(needed_bytes, str(tmp_path))
    assert size > FILE_BYTES
    assert needed == [0, int(size * SPACE_MARGIN), int(size * SPACE_MARGIN)]
    assert committed_steps(tmp_path) == [3, 2, 1]


def overtaken_while_writing(ranks: Ranks, run: str) -> str:
    """Another job takes the run over when the files have been written, before the commit."""
    mine = [True]

    class Overtaken(OneFile):
        def flush_and_hash(self, partial: Path, written: list[Path]) -> dict[str, dict[str, Any]]:
            entries = super().flush_and_hash(partial, written)
            mine[0] = False
            return entries

    saver = saver_of(ranks, run, Overtaken(), lambda: mine[0])
    with pytest.raises(TakenOverError) as error:
        saver.save(None, 1, {}, wait=True)
    return str(error.value)


def test_a_save_that_another_job_has_overtaken_is_not_committed(one_rank: RankPool, tmp_path: Path) -> None:
    (message,) = one_rank.run(overtaken_while_writing, str(tmp_path))
    assert "another process has taken over this run" in message
    assert committed_steps(tmp_path) == []
    # What lies there may be the other's: nothing was renamed, marked or removed.
    assert [path.suffix for path in (tmp_path / "checkpoints").iterdir()] == [".tmp"]


def save_in_a_run_of_another_job(ranks: Ranks, run: str) -> str:
    mine = [True]
    saver = saver_of(ranks, run, OneFile(), lambda: mine[0])
    mine[0] = False
    with pytest.raises(TakenOverError) as error:
        saver.save(None, 1, {}, wait=True)
    return str(error.value)


def test_no_save_is_begun_in_a_run_of_another_job(one_rank: RankPool, tmp_path: Path) -> None:
    one_rank.run(save_in_a_run_of_another_job, str(tmp_path))
    assert not (tmp_path / "checkpoints").exists()


def failures_of(ranks: Ranks, run: str, full: tuple[int, ...], steps: int) -> tuple[int, str | None]:
    """The step of the last save, and the error that it raised."""
    saver = saver_of(ranks, run, OneFile(full), failures=2)
    for step in range(1, steps + 1):
        try:
            saver.save(None, step, {}, wait=True)
        except TrainingError as error:
            return step, str(error)
    return steps, None


def test_a_save_that_succeeds_forgives_those_that_failed(one_rank: RankPool, tmp_path: Path) -> None:
    assert one_rank.run(failures_of, str(tmp_path), (1, 3, 5), 6) == [(6, None)]
    assert committed_steps(tmp_path) == [6, 4, 2]
    ((step, message),) = one_rank.run(failures_of, str(tmp_path / "other"), (2, 3), 6)
    assert step == 3
    assert "2 checkpoints in a row could not be written" in str(message)


class SlowToRemove(OneFile):
    """A removal begins only when ``may_remove`` is set. ``events``: what happens, in which thread."""

    def __init__(self) -> None:
        super().__init__()
        self.may_remove = threading.Event()
        self.events: list[tuple[str, str]] = []

    def _note(self, event: str) -> None:
        self.events.append((event, threading.current_thread().name))

    def begin(self, partial: Path, final: Path, needed_bytes: int) -> None:
        self._note(f"begin {final.name}")
        super().begin(partial, final, needed_bytes)

    def remove(self, folder: Path) -> None:
        if folder.name == "step-1" and folder.exists():
            assert self.may_remove.wait(60)
            super().remove(folder)
            self._note("removed step-1")
        else:
            super().remove(folder)


def save_beside_a_slow_removal(ranks: Ranks, run: str) -> list[tuple[str, str]]:
    storage = SlowToRemove()
    section = CheckpointSection(keep_last=1)  # type: ignore[call-arg]
    saver = CheckpointSaver(Path(run), section, ranks, storage, CheckpointSearch(None, (), ()))
    for step in (1, 2):
        saver.save(None, step, {}, wait=True)
    storage.events.append(("training", threading.current_thread().name))
    threading.Timer(0.5, storage.may_remove.set).start()
    saver.save(None, 3, {}, wait=True)
    saver.close()
    assert committed_steps(Path(run)) == [3]
    return storage.events


def test_training_does_not_wait_for_the_removal_of_old_checkpoints_but_the_next_save_does(
    one_rank: RankPool, tmp_path: Path
) -> None:
    """What it frees may be the room that the save needs."""
    assert one_rank.run(save_beside_a_slow_removal, str(tmp_path)) == [
        [
            ("begin step-1", "MainThread"),
            ("begin step-2", "MainThread"),
            ("training", "MainThread"),
            ("removed step-1", "checkpoint-removal"),
            ("begin step-3", "MainThread"),
        ]
    ]


class Hanging(OneFile):
    """The first writer of step 1 goes on after it was given up."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on, self.written = threading.Event(), threading.Event()

    def write_files(self, shards: Shards) -> list[Path]:
        if len(self.needed) > 1:
            return super().write_files(shards)
        assert self.go_on.wait(60)
        shards.partial.mkdir(exist_ok=True)
        (shards.partial / "late.pt").touch()
        self.written.set()
        return []

    def write_manifest(self, partial: Path, manifest: dict[str, Any]) -> None:
        self.go_on.set()
        assert self.written.wait(60)
        super().write_manifest(partial, manifest)


def save_again_beside_a_writer_that_was_given_up(ranks: Ranks, run: str) -> list[str]:
    saver = saver_of(ranks, run, Hanging())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "WRITE_SECONDS", 0.1)
        saver.save(None, 1, {}, wait=True)
    saver.save(None, 1, {}, wait=True)
    return verify(Path(run) / "checkpoints" / "step-1")


def test_a_step_that_is_saved_again_does_not_meet_a_writer_that_was_given_up(
    one_rank: RankPool, tmp_path: Path
) -> None:
    assert one_rank.run(save_again_beside_a_writer_that_was_given_up, str(tmp_path)) == [[]]
    assert committed_steps(tmp_path) == [1]


class Stuck(OneFile):
    """Step 3 cannot be renamed; nor, unless it ``lists``, can the folder be read."""

    def __init__(self, lists: bool) -> None:
        super().__init__()
        self._lists = lists

    def pass_over(self, folder: Path) -> str:
        return super().pass_over(folder) if folder.name != "step-3" else disk_full()

    def remove_leftovers(self, parent: Path) -> list[str]:
        return super().remove_leftovers(parent) if self._lists else disk_full()


def start_beside_leftovers(ranks: Ranks, run: str, lists: bool) -> None:
    found = CheckpointSearch(None, (), ("step-3: damaged", "step-2: damaged"), (3, 2))
    CheckpointSaver(Path(run), CheckpointSection(), ranks, Stuck(lists), found)  # type: ignore[call-arg]


def test_a_refused_checkpoint_that_cannot_be_renamed_does_not_keep_the_rest_from_being_cleaned_up(
    one_rank: RankPool, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    for name in ("step-2", "step-3"):
        (folder / name).mkdir(parents=True)
        (folder / name / "COMMITTED").touch()
    (folder / "step-4.attempt.tmp").mkdir()
    one_rank.run(start_beside_leftovers, str(tmp_path), True)
    assert sorted(path.name for path in folder.iterdir()) == ["step-2.passed-over", "step-3"]
    assert "step-3 could not be put aside: [Errno 28] No space left" in one_rank.log(0)


def test_a_clean_up_that_fails_is_logged(one_rank: RankPool, tmp_path: Path) -> None:
    for name in ("step-2", "step-3"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    one_rank.run(start_beside_leftovers, str(tmp_path), False)
    assert "what earlier saves left is not removed: rank 0: [Errno 28] No space left" in one_rank.log(0)
