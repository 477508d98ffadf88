"""What happens to a run besides kills: checkpoints that cannot be seen, a disk that fills, other programs."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from alignkd.errors import EXIT_USER_ERROR
from alignkd.run_folder.atomic_files import read_json
from alignkd.run_folder.checkpoints import MARKER
from alignkd.run_folder.paths import RunPaths
from tests.chaos.plan import CONVERSION, MARKERS, UNMOUNTED
from tests.chaos.report import Report
from tests.checkpoint.killing import wait_until_gone
from tests.needs import small_disk

LONGEST_START = 300.0  # seconds that a start may take before it counts as hung


def alignkd(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    with (folder / "launcher.log").open("ab") as log:
        command = [sys.executable, "-m", "launcher.cli", *arguments]
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)


def between_starts(run: Path, accident: str, seconds: float, report: Report, where: str) -> None:
    """``run`` has a checkpoint. What the next start finds must be what the last one left."""
    report.accidents[accident] += 1
    if accident == CONVERSION:
        convert_and_kill(run, seconds)
        return
    result = read_json(RunPaths(run).result) or {}
    # The launcher may have been killed when all was done: then a start only says so.
    expected = 0 if result.get("status") == "done" else EXIT_USER_ERROR
    with HIDDEN[accident](run):
        before = contents(run)
        code = alignkd(run, "resume", str(run)).wait(timeout=LONGEST_START)
        wait_until_gone(run)
        if code != expected:
            report.silent.append(f"{where}, {accident}: the start ended with {code}")
        after = contents(run)
        changed = sorted(str(path) for path in before.keys() | after if before.get(path) != after.get(path))
        if changed:
            report.silent.append(f"{where}, {accident}: the start changed {', '.join(changed)}")


@contextlib.contextmanager
def _without_markers(run: Path) -> Iterator[None]:
    markers = {path: path.read_bytes() for path in RunPaths(run).checkpoints.glob(f"step-*/{MARKER}")}
    for path in markers:
        path.unlink()
    yield
    for path, content in markers.items():
        path.write_bytes(content)


@contextlib.contextmanager
def _unmounted(run: Path) -> Iterator[None]:
    folder = RunPaths(run).checkpoints
    away = folder.rename(run.with_name(f"{run.name}-away"))
    folder.mkdir()  # the mount point
    yield
    shutil.rmtree(folder)
    away.rename(folder)


HIDDEN: dict[str, Callable[[Path], AbstractContextManager[None]]] = {
    MARKERS: _without_markers,
    UNMOUNTED: _unmounted,
}


def contents(run: Path) -> dict[Path, str]:
    """Hashes of what must not be lost: all of the checkpoints, and the metrics."""
    paths = [*RunPaths(run).checkpoints.rglob("*"), RunPaths(run).metrics]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()}


def convert_and_kill(run: Path, seconds: float) -> None:
    """``alignkd ckpt convert``, killed after ``seconds`` unless it has ended."""
    process = alignkd(run, "ckpt", "convert", str(run))
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=seconds)
    process.kill()
    process.wait()


def can_fill_a_disk() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder), "1m"):
                return True
        except pytest.skip.Exception:  # in CI it is a failure
            return False


def start_on_a_filling_disk(run: Path, share: float) -> int:
    """A start whose checkpoints lie on a disk that something else fills while the first of its saves is
    written: room for ``share`` of a checkpoint is left. Returns the exit code; the disk has room again."""
    folder = RunPaths(run).checkpoints
    elsewhere = run.with_name(f"{run.name}-elsewhere")
    folder.rename(elsewhere)
    folder.mkdir()
    size = max(_size(path) for path in elsewhere.glob("step-*"))
    with small_disk(folder, f"{(_size(elsewhere) + 3 * size) // 1024 + 1024}k"):
        shutil.copytree(elsewhere, folder, dirs_exist_ok=True)
        process = alignkd(run, "resume", str(run))
        _fill(folder, share * size, process)
        code = process.wait(timeout=LONGEST_START)
        wait_until_gone(run)
        shutil.rmtree(elsewhere)
        shutil.copytree(folder, elsewhere, ignore=shutil.ignore_patterns("ballast"))
    folder.rmdir()
    elsewhere.rename(folder)
    return code


def _fill(folder: Path, left: float, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + LONGEST_START
    while process.poll() is None and not any(folder.glob("step-*.tmp")):
        assert time.monotonic() < deadline, f"{folder}: no save was begun"
        time.sleep(0.002)
    room = shutil.disk_usage(folder).free - int(left)
    with contextlib.suppress(OSError):  # the save may take the last of the room first
        (folder / "ballast").write_bytes(bytes(max(room, 0)))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
