from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignkd.run_folder.checkpoints import (
    committed_steps,
    is_marked,
    new_attempt,
    partial_folder,
    read_manifest,
    step_folder,
    step_folders,
    stored_bytes,
    universal_folder,
)


def make(run: Path, name: str, marked: bool = True) -> Path:
    folder = run / "checkpoints" / name
    folder.mkdir(parents=True)
    if marked:
        (folder / "COMMITTED").touch()
    return folder


def test_names_are_those_that_earlier_versions_wrote(tmp_path: Path) -> None:
    final = step_folder(tmp_path, 12)
    assert final == tmp_path / "checkpoints" / "step-12"
    assert universal_folder(tmp_path, 12) == tmp_path / "checkpoints" / "step-12.universal"
    assert partial_folder(final, "ab").name == "step-12.ab.tmp"
    assert partial_folder(universal_folder(tmp_path, 12), "*").name == "step-12.universal.*.tmp"


def test_two_attempts_never_write_into_the_same_folder() -> None:
    assert len({new_attempt() for _ in range(1000)}) == 1000


def test_steps_with_the_marker_count_newest_first(tmp_path: Path) -> None:
    assert committed_steps(tmp_path) == []
    for name in ("step-9", "step-10", "step-100"):
        make(tmp_path, name)
    make(tmp_path, "step-11", marked=False)
    for name in ("step-12.universal", "step-13.ab.tmp", "step-14.set-aside", "step-15.passed-over", "step-x"):
        make(tmp_path, name)
    (tmp_path / "checkpoints" / "latest").write_text("step-9")
    assert committed_steps(tmp_path) == [100, 10, 9]
    folders = step_folders(tmp_path / "checkpoints")
    assert [folder.name for folder in folders] == ["step-100", "step-11", "step-10", "step-9"]
    assert [is_marked(folder) for folder in folders] == [True, False, True, True]


def test_the_manifest_of_another_step_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path, "step-6")
    (folder / "manifest.json").write_text(json.dumps({"step": 6, "files": {"a": {"bytes": 3}}}))
    assert stored_bytes(read_manifest(folder)) == 3
    renamed = folder.rename(folder.with_name("step-8"))
    with pytest.raises(ValueError, match="it describes step 6"):
        read_manifest(renamed)
    conversion = renamed.rename(folder.with_name("step-6.universal"))
    assert read_manifest(conversion)["step"] == 6
