from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from alignkd.run_folder import atomic_files
from alignkd.run_folder.atomic_files import flush_tree, read_json, replacing, write_json, write_text_atomic


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """``fsync NAME`` and ``rename NAME``, in their order; temporary files are called ``tmp``."""
    seen: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def shown(path: str | Path) -> str:
        name = Path(path).name
        return "tmp" if name.endswith(".tmp") else name

    def recorded_fsync(descriptor: int) -> None:
        seen.append(f"fsync {shown(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        fsync(descriptor)

    def recorded_replace(path: Path, target: Path) -> Path:
        seen.append(f"rename {shown(target)}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    return seen


def test_content_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, events: list[str]) -> None:
    write_json(tmp_path / "a.json", {"é": 1})
    assert events == ["fsync tmp", "rename a.json", f"fsync {tmp_path.name}"]
    assert (tmp_path / "a.json").read_text() == '{\n  "é": 1\n}\n'


def test_what_need_not_be_durable_is_renamed_without_waiting_for_the_disk(
    tmp_path: Path, events: list[str]
) -> None:
    write_text_atomic(tmp_path / "a", "text", durable=False)
    assert events == ["rename a"]
    assert (tmp_path / "a").read_text() == "text"


@pytest.mark.parametrize("durable", [True, False])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "a"
    write_text_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomic(path, "\ud800", durable=durable)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_full_when_it_is_flushed_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    write_text_atomic(path, "old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_of_a_half_written_file_sees_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("ne")
        assert path.read_text() == "old"
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_two_writers_on_two_hosts_never_share_a_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_files.os, "getpid", lambda: 7)  # as on another host of the shared file system
    path = tmp_path / "a"
    with replacing(path) as first, replacing(path) as second:
        assert first.parent == second.parent == tmp_path  # a rename does not cross file systems
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_permissions_are_the_given_ones(tmp_path: Path) -> None:
    old_mask = os.umask(0o077)
    try:
        for mode in (0o644, 0o755):
            write_text_atomic(tmp_path / "a", "#!/bin/bash\n", mode=mode)
            assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode
    finally:
        os.umask(old_mask)


def test_without_given_permissions_the_umask_decides(tmp_path: Path) -> None:
    earlier = os.umask(0o007)
    try:
        write_json(tmp_path / "file", {})
    finally:
        os.umask(earlier)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o660


def test_a_tree_is_flushed_from_its_leaves_to_its_root(tmp_path: Path, events: list[str]) -> None:
    (tmp_path / "root" / "inner").mkdir(parents=True)
    for name in ("a", "inner/b"):
        (tmp_path / "root" / name).touch()
    flush_tree(tmp_path / "root")
    assert set(events[:2]) == {"fsync a", "fsync b"}
    assert events[2:] == ["fsync inner", "fsync root"]


@pytest.mark.parametrize("text", [None, "", "{", "[]", "null", "7", b"\xff\xfe"])
def test_nothing_but_one_json_object_is_read(tmp_path: Path, text: str | bytes | None) -> None:
    path = tmp_path / "a.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert read_json(path) is None
    write_json(path, {"a": [1]})
    assert read_json(path) == json.loads(path.read_text()) == {"a": [1]}
