import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignkd.errors import AlignkdError, UserError
from launcher.backends import operators
from launcher.backends.operators import OPERATOR, build_cpu_operators, extensions_folder

MAKE_SO = (
    "import pathlib, sys; path = pathlib.Path(sys.argv[1]); "
    "path.parent.mkdir(parents=True, exist_ok=True); path.touch()"
)


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("g++", "ninja"):
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    return {"PATH": str(programs), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}


@pytest.fixture
def build(environment, tmp_path):
    """Runs the build with a small program in the place of the compiler; returns the notes."""

    def run(program: str = MAKE_SO, time_out: float = 20.0) -> list[str]:
        notes: list[str] = []
        target = str(tmp_path / "extensions" / OPERATOR / f"{OPERATOR}.so")
        build_cpu_operators(environment, notes.append, [sys.executable, "-c", program, target], time_out)
        return notes

    return run


def test_built_once_per_version(build, monkeypatch) -> None:
    assert build() == ["building DeepSpeed's CPU operator (once)"]
    assert build("raise SystemExit(1)") == []
    monkeypatch.setattr(operators, "_versions", lambda: {"torch": "other"})
    assert len(build()) == 1


def test_a_build_that_lost_its_result_is_repeated(build, tmp_path) -> None:
    build()
    (tmp_path / "extensions" / OPERATOR / f"{OPERATOR}.so").unlink()
    assert len(build()) == 1


@pytest.mark.parametrize(
    ("missing", "message"), [("g++", "compiler g\\+\\+"), ("ninja", "pip install ninja")]
)
def test_missing_tools_are_named(build, environment, missing: str, message: str) -> None:
    (Path(environment["PATH"]) / missing).unlink()
    with pytest.raises(UserError, match=message):
        build()


def test_failure_shows_what_the_compiler_said(build) -> None:
    with pytest.raises(AlignkdError, match="exit code 7") as caught:
        build("import sys; print('fatal: no header'); sys.exit(7)")
    assert "fatal: no header" in str(caught.value)


def test_a_hang_is_an_error_with_the_folder(build, tmp_path) -> None:
    with pytest.raises(AlignkdError, match="not built within 1 s") as caught:
        build("import time; time.sleep(600)", time_out=1.0)
    assert str(tmp_path / "extensions") in str(caught.value)


def make_lock(tmp_path, age: float) -> Path:
    lock = tmp_path / "extensions" / OPERATOR / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - age,) * 2)
    return lock


def test_a_stale_lock_is_removed_and_named(build, tmp_path) -> None:
    lock = make_lock(tmp_path, age=600)
    notes = build()
    assert any(f"10 minutes old: {lock}" in note for note in notes)
    assert not lock.exists()


def test_a_young_lock_is_waited_for(build, tmp_path, monkeypatch) -> None:
    lock = make_lock(tmp_path, age=0)
    monkeypatch.setattr(operators, "STALE_SECONDS", 1.0)
    notes = build()
    assert "waiting for another build" in notes[0]
    assert not lock.exists()


def test_an_old_lock_that_a_process_holds_stays(build, tmp_path) -> None:
    lock = make_lock(tmp_path, age=600)
    with lock.open("rb"), pytest.raises(AlignkdError, match="another build has held this lock"):
        build(time_out=0.5)
    assert lock.exists()


def test_two_launches_do_not_build_at_once(build, tmp_path) -> None:
    (tmp_path / "extensions").mkdir()
    guard = tmp_path / "extensions" / f".{OPERATOR}.alignkd-lock"
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); "
            "print('held', flush=True); time.sleep(600)",
            str(guard),
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(AlignkdError, match="another launch has been building"):
            build(time_out=0.3)
    finally:
        holder.kill()
        holder.wait()
    assert len(build()) == 1, "the kernel releases the lock of a killed process"


def test_every_virtual_environment_builds_in_a_folder_of_its_own(monkeypatch) -> None:
    assert extensions_folder({"TORCH_EXTENSIONS_DIR": "/x"}) == Path("/x")
    here = extensions_folder({"HOME": "/home/me"})
    assert here.is_relative_to("/home/me/.cache")
    monkeypatch.setattr("sys.prefix", "/another/environment")
    assert extensions_folder({"HOME": "/home/me"}) != here
