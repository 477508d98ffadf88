from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkd.run_folder import verification
from alignkd.run_folder.atomic_files import write_text_atomic
from alignkd.run_folder.checkpoints import marker_text
from alignkd.run_folder.verification import (
    data_files,
    describe,
    hash_differences,
    problems_of,
    share_of,
    verify,
    verify_sizes,
)

NAMES = ("a.pt", "b.pt", "inner/c.pt")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "step-4"
    for number, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes([number]) * 10)
    write_manifest(folder, step=4, world_size=2)
    (folder / "COMMITTED").touch()
    return folder


def write_manifest(folder: Path, **facts: object) -> None:
    files = {name: describe(folder, name) for name in data_files(folder)}
    (folder / "manifest.json").write_text(json.dumps({**facts, "files": files}))


def flip(path: Path) -> None:
    path.write_bytes(b"\xff" + path.read_bytes()[1:])


def test_what_was_written_has_no_problems(folder: Path) -> None:
    assert data_files(folder) == list(NAMES)
    assert verify(folder, needed=("step", "world_size")) == problems_of(folder) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (flip, "has another sha256"),
        (lambda path: path.write_bytes(b"short"), "has 5 bytes instead of 10"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_damage_to_any_file_is_named(
    folder: Path, name: str, damage: Callable[[Path], None], problem: str
) -> None:
    damage(folder / name)
    (found,) = verify(folder)
    assert found.startswith(f"{name} {problem}")


def test_a_marker_that_a_kill_left_without_its_name_is_no_problem(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = folder / "COMMITTED"
    marker.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: pytest.fail("killed"))
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(pytest.fail.Exception):
            write_text_atomic(marker, marker_text(folder))
    assert [path.name for path in folder.glob(".*")] != []
    marker.touch()
    assert verify(folder) == verify_sizes(folder)[0] == []
    (folder / ".COMMITTED.pt").touch()  # DeepSpeed might read it
    assert verify(folder) == [".COMMITTED.pt is not in the manifest"]


def test_a_file_that_the_manifest_does_not_name_is_a_problem(folder: Path) -> None:
    (folder / "inner" / "stranger.pt").touch()
    assert verify(folder) == ["inner/stranger.pt is not in the manifest"]
    assert verify_sizes(folder)[0] == verify(folder)


def test_names_and_sizes_are_compared_without_reading_the_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "describe", lambda *_: pytest.fail("it reads a file"))
    flip(folder / "a.pt")
    problems, files = verify_sizes(folder)
    assert (problems, sorted(files)) == ([], list(NAMES))
    (folder / "a.pt").write_bytes(b"short")
    (folder / "b.pt").unlink()
    assert verify_sizes(folder)[0] == ["a.pt has 5 bytes instead of 10", "b.pt is missing"]


def test_all_that_is_wrong_is_named_at_once(folder: Path) -> None:
    (folder / "a.pt").unlink()
    flip(folder / "b.pt")
    assert verify(folder) == ["a.pt is missing", "b.pt has another sha256 than when it was written"]


def test_a_marker_vouches_for_its_own_manifest_only(folder: Path) -> None:
    (folder / "COMMITTED").write_text(marker_text(folder))
    assert verify(folder) == []
    write_manifest(folder, step=4, world_size=3)
    assert verify(folder) == ["COMMITTED belongs to another manifest.json"]
    (folder / "COMMITTED").write_text("")  # as earlier versions wrote it
    assert verify(folder) == []


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_the_ranks_together_hash_every_file_once(folder: Path, world_size: int) -> None:
    shares = [share_of(NAMES, rank, world_size) for rank in range(world_size)]
    assert sorted(name for share in shares for name in share) == sorted(NAMES)
    for name in NAMES:
        flip(folder / name)
    _, files = verify_sizes(folder)
    found = [problem for share in shares for problem in hash_differences(folder, files, share)]
    assert sorted(problem.split()[0] for problem in found) == sorted(NAMES)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "[]",
        "null",
        '{"files": {}}',
        '{"step": 4}',
        '{"step": 4, "files": {"a.pt": 7}}',
        '{"step": 4, "files": {"a.pt": {}}}',
        "\ufffd",
    ],
)
def test_a_damaged_manifest_is_a_problem_and_no_crash(folder: Path, text: str | None) -> None:
    manifest = folder / "manifest.json"
    manifest.unlink() if text is None else manifest.write_text(text)
    (found,) = verify(folder)
    assert found.startswith("manifest.json cannot be read (")


def test_the_manifest_of_another_step_is_a_problem(folder: Path) -> None:
    (found,) = verify(folder.rename(folder.with_name("step-5")))
    assert found == "manifest.json cannot be read (it describes step 4)"


def test_missing_keys_are_named(folder: Path) -> None:
    write_manifest(folder, step=4)
    assert verify(folder, needed=("step", "config", "data")) == [
        "manifest.json lacks the key config",
        "manifest.json lacks the key data",
    ]


def test_a_failing_file_system_says_nothing_about_the_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(verification, "describe", fails)
    with pytest.raises(OSError, match="Input/output error"):
        verify(folder)
    (found,) = problems_of(folder)
    assert "Input/output error" in found
