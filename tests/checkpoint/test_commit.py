"""The order in which a checkpoint comes to count, without an engine."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkd.checkpoint.commit import Save, commit, discard
from alignkd.checkpoint.storage import FileEntries, Storage
from alignkd.errors import TakenOverError
from alignkd.run_folder.checkpoints import committed_steps, is_marked
from alignkd.run_folder.patience import Patience
from alignkd.run_folder.verification import verify

SHARDS = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt")


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Begun, and written by its one rank, but not flushed."""
    save = Save.of_step(tmp_path, 4, "attempt", {"config": {}}, asynchronous=True)
    save.snapshot_seconds = 1.0
    Storage().begin(save.partial, save.final, needed_bytes=0)
    for name in SHARDS:
        (save.partial / name).write_bytes(name.encode())
    return save


def run_commit(save: Save, storage: Storage, sync_rows: Callable[[], None] = lambda: None) -> FileEntries:
    files = storage.flush_and_hash(save.partial, [save.partial / name for name in SHARDS])
    commit(save, files, 2.0, 0.5, 1, storage, sync_rows)
    return files


def test_a_committed_checkpoint_is_whole_and_says_what_it_cost(save: Save, tmp_path: Path) -> None:
    files = run_commit(save, Storage())
    assert committed_steps(tmp_path) == [4]
    assert verify(save.final) == []
    assert json.loads((save.final / "manifest.json").read_text()) == {
        "step": 4,
        "world_size": 1,
        "config": {},
        "timing": {"asynchronous": True, "held_seconds": 0.5, "save_seconds": 3.0},
        "files": files,
    }
    assert sorted(files) == sorted(SHARDS)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-4"
    assert not save.partial.exists()
    manifest = (save.final / "manifest.json").read_bytes()
    marker = {"step": 4, "manifest_sha256": hashlib.sha256(manifest).hexdigest()}
    assert json.loads((save.final / "COMMITTED").read_text()) == marker


def test_everything_is_on_the_disk_before_the_next_thing_relies_on_it(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def recorded_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(f"fsync {named(path)}")
        fsync(descriptor)

    def recorded_rename(path: Path, target: Path) -> Path:
        events.append(f"rename {path.name} to {Path(target).name}")
        return rename(path, target)

    def recorded_replace(path: Path, target: Path) -> Path:
        events.append(f"replace {named(Path(target))}")
        return replace(path, target)

    def named(path: Path) -> str:
        """Without what is drawn in the name of a temporary file."""
        return re.sub(r"\.[0-9a-f]{12}\.tmp$", ".tmp", str(path.relative_to(tmp_path / "checkpoints")))

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    run_commit(save, Storage(), lambda: events.append("rows"))
    partial = "step-4.attempt.tmp"
    assert events == [
        *(f"fsync {partial}/{name}" for name in SHARDS),
        "rows",
        f"fsync {partial}/manifest.json",
        f"fsync {partial}",
        f"rename {partial} to step-4",
        "fsync .",
        "fsync step-4/.COMMITTED.tmp",
        "replace step-4/COMMITTED",
        "fsync step-4",
        "replace latest",
    ]


@pytest.mark.parametrize("phase", ["write_manifest", "publish", "mark"])
def test_a_phase_that_fails_leaves_nothing_that_counts(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    storage = Storage()
    monkeypatch.setattr(storage, phase, full)
    with pytest.raises(OSError, match="No space left"):
        run_commit(save, storage)
    assert committed_steps(tmp_path) == []
    discard(save, storage)
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("lost", [os.unlink, lambda path: os.truncate(path, 3)])
def test_files_that_rank_0_does_not_see_as_they_were_written_are_not_committed(
    save: Save, tmp_path: Path, lost: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignkd.checkpoint.commit.PATIENCE_SECONDS", 0.0)
    storage = Storage()
    files = storage.flush_and_hash(save.partial, [save.partial / name for name in SHARDS])
    lost(save.partial / SHARDS[1])
    with pytest.raises(OSError, match=f"that all ranks share(.|\n)*{SHARDS[1]}"):
        commit(save, files, 2.0, 0.5, 1, storage, lambda: None)
    assert not (save.partial / "manifest.json").exists()
    assert committed_steps(tmp_path) == []


@pytest.mark.parametrize("early", [os.unlink, lambda path: os.truncate(path, 3)])
def test_rank_0_waits_for_files_that_it_sees_late(save: Save, early: Callable[[Path], None]) -> None:
    storage = Storage()
    files = storage.flush_and_hash(save.partial, [save.partial / name for name in SHARDS])
    path, seconds = save.partial / SHARDS[1], [0.0]
    content = path.read_bytes()
    early(path)

    def sleep(pause: float) -> None:
        seconds[0] += pause
        if seconds[0] > 3:
            path.write_bytes(content)

    storage.check_visible(save.partial, files, Patience(30.0, lambda: seconds[0], sleep))
    assert seconds == [4.0]
    early(path)
    (save.partial / SHARDS[0]).unlink()
    seconds[0] = -1000.0
    with pytest.raises(OSError, match="that all ranks share"):
        storage.check_visible(save.partial, files, Patience(30.0, lambda: seconds[0], sleep))
    assert seconds == [-970.0]  # for its name and its size together


def test_rows_that_cannot_be_written_stop_the_commit(save: Save, tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        run_commit(save, Storage(), full)
    assert save.partial.exists()
    assert not (save.partial / "manifest.json").exists()


def test_without_its_name_in_latest_a_checkpoint_counts_all_the_same(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_final: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    storage = Storage()
    monkeypatch.setattr(storage, "write_latest", full)
    run_commit(save, storage)
    assert committed_steps(tmp_path) == [4]


def test_discarding_a_save_keeps_a_checkpoint_that_counts(save: Save) -> None:
    run_commit(save, Storage())
    discard(save, Storage())  # the failure came after the marker
    assert is_marked(save.final)
    save.partial.mkdir()
    discard(save, Storage())
    assert is_marked(save.final)
    assert not save.partial.exists()


def test_discarding_a_save_leaves_a_folder_that_another_writer_published(save: Save, tmp_path: Path) -> None:
    other = Save.of_step(tmp_path, 4, "other", {"config": {}}, asynchronous=True)
    Storage().begin(other.partial, other.final, needed_bytes=0)
    for name in SHARDS:
        (other.partial / name).write_bytes(b"the other's")
    storage = Storage()
    storage.publish(other.partial, other.final)  # and is about to mark it
    with pytest.raises(OSError, match="not empty"):
        run_commit(save, storage)
    discard(save, storage)
    assert not save.partial.exists()
    assert (other.final / SHARDS[0]).read_bytes() == b"the other's"


def test_a_save_over_a_whole_checkpoint_that_lost_its_marker_puts_it_aside(
    save: Save, tmp_path: Path
) -> None:
    run_commit(save, Storage())
    for number in ("", "-2"):
        (save.final / "COMMITTED").unlink()
        Storage().begin(save.partial, save.final, needed_bytes=0)
        aside = tmp_path / "checkpoints" / f"step-4.unmarked{number}"
        assert (aside / SHARDS[0]).read_bytes() == SHARDS[0].encode()
        assert not save.final.exists()
        for name in SHARDS:
            (save.partial / name).write_bytes(name.encode())
        run_commit(save, Storage())


def test_a_save_over_a_refused_checkpoint_puts_it_aside(save: Save, tmp_path: Path) -> None:
    run_commit(save, Storage())
    (save.final / SHARDS[0]).write_bytes(b"damaged")
    Storage().begin(save.partial, save.final, needed_bytes=0)
    aside = tmp_path / "checkpoints" / "step-4.passed-over"
    assert (aside / SHARDS[0]).read_bytes() == b"damaged"
    assert committed_steps(tmp_path) == []


def test_a_save_that_does_not_fit_is_refused_before_anything_is_written(save: Save) -> None:
    discard(save, Storage())
    with pytest.raises(OSError, match="bytes free, a checkpoint takes"):
        Storage().begin(save.partial, save.final, needed_bytes=2**62)
    assert not save.partial.exists()


def test_an_interrupted_removal_leaves_nothing_that_counts(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_commit(save, Storage())

    def fails(_folder: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("alignkd.checkpoint.storage.shutil.rmtree", fails)
    with pytest.raises(OSError, match="Input/output error"):
        Storage().remove(save.final)
    assert not save.final.exists()
    (left,) = tmp_path.glob("checkpoints/step-4.*.tmp")
    assert (left / SHARDS[0]).exists()
    monkeypatch.undo()
    assert Storage().remove_leftovers(left.parent) == [left.name]


def test_a_link_to_a_checkpoint_elsewhere_is_removed_without_what_it_points_to(
    save: Save, tmp_path: Path
) -> None:
    run_commit(save, Storage())
    elsewhere = save.final.rename(tmp_path / "elsewhere")
    save.final.symlink_to(elsewhere)
    assert committed_steps(tmp_path) == [4]
    Storage().remove(save.final)
    assert committed_steps(tmp_path) == []
    assert not save.final.is_symlink()
    assert is_marked(elsewhere)
    assert verify(elsewhere) == []


def test_what_killed_saves_and_removals_left_is_removed(tmp_path: Path) -> None:
    parent = tmp_path / "checkpoints"
    kept = ("step-2", "step-2.universal", "step-6.set-aside", "step-8.passed-over")
    left = ("step-3", "step-4.ab.tmp", "step-4.universal.cd.tmp", "step-5.universal")
    for name in kept + left:
        (parent / name).mkdir(parents=True)
    (parent / "step-2" / "COMMITTED").touch()
    (parent / "step-9.tmp").touch()  # not a folder: nobody here has made it
    assert sorted(Storage().remove_leftovers(parent)) == sorted(left)
    assert sorted(path.name for path in parent.iterdir()) == sorted([*kept, "step-9.tmp"])


def test_a_folder_that_was_whole_is_never_removed_for_want_of_a_marker(save: Save, tmp_path: Path) -> None:
    run_commit(save, Storage())
    (save.final / "COMMITTED").unlink()
    copied = save.final.with_name("step-6")  # by hand: it describes another step
    shutil.copytree(save.final, copied)
    assert Storage().remove_leftovers(save.final.parent) == []
    assert sorted(path.name for path in save.final.parent.iterdir()) == [
        "latest",
        "step-4.unmarked",
        "step-6.unmarked",
    ]
    assert (save.final.parent / "step-4.unmarked" / SHARDS[0]).read_bytes() == SHARDS[0].encode()


@pytest.mark.parametrize("lost_before", ["publish", "mark"])
def test_a_commit_stops_where_another_process_takes_over(
    save: Save, tmp_path: Path, lost_before: str
) -> None:
    """The disk hangs after the manifest, or after the rename."""
    looks: list[str] = ["publish", "mark"]

    def require_writer() -> None:
        if looks.pop(0) == lost_before:
            raise TakenOverError("another process writes this run")

    files = Storage().flush_and_hash(save.partial, [save.partial / name for name in SHARDS])
    with pytest.raises(TakenOverError):
        commit(save, files, 2.0, 0.5, 1, Storage(), lambda: None, require_writer)
    assert committed_steps(tmp_path) == []
    assert save.partial.exists() is (lost_before == "publish")
    assert not (tmp_path / "checkpoints" / "latest").exists()
