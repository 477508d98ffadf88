"""Runs under the local back end whose ranks, or whose launcher, are really killed.

``python -m tests.checkpoint.killing RUN PROGRAM ARGUMENT...`` is the launcher of ``alignkd resume RUN`` whose
ranks run ``python -m PROGRAM RUN ARGUMENT...`` instead of ``alignkd.train``.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from alignkd.run_folder.paths import RunPaths
from launcher.backends.local import run_local
from launcher.run.manifest import Manifest, read_manifest

FAULTY_STORAGE = "tests.checkpoint.faulty_storage"
PROGRAMS = ("alignkd.train", FAULTY_STORAGE, "tests.chaos.rank")
CPU_RANKS = Manifest("", 2, 1, 2, 1, "local", "cpu", {}, None, {})


def write_manifest(run: Path) -> None:
    """For a run folder that no launcher wrote: two ranks on this machine."""
    RunPaths(run).manifest.write_text(json.dumps(dataclasses.asdict(CPU_RANKS)))


def start_with_kill(run: Path, phase: str, rank: int, victim: str, step: int) -> subprocess.Popen[bytes]:
    """The launcher's process; it ends by the kill, or after it."""
    return start_program(run, FAULTY_STORAGE, phase, str(rank), victim, str(step))


def start_program(run: Path, program: str, *arguments: str) -> subprocess.Popen[bytes]:
    """The process of a launcher with ranks of another program, one of ``PROGRAMS``."""
    assert program in PROGRAMS
    command = [sys.executable, "-m", "tests.checkpoint.killing", str(run), program, *arguments]
    with (run / "launcher.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def rank_processes(run: Path) -> list[int]:
    """Process ids of the ranks of ``run``, and of loader workers that they forked."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        of_rank = (
            any(program.encode() in words for program in PROGRAMS)
            and b"tests.checkpoint.killing" not in words
        )
        if of_rank and str(run).encode() in words:
            found.append(int(path.parent.name))
    return sorted(found)


def wait_until_gone(run: Path, seconds: float = 60) -> None:
    """The kernel ends the ranks of a launcher that was killed, a moment later."""
    deadline = time.monotonic() + seconds
    while rank_processes(run):
        assert time.monotonic() < deadline, f"ranks of {run} are still there"
        time.sleep(0.05)


def main(run: str, program: str, *arguments: str) -> int:
    command = [sys.executable, "-m", program, run, *arguments]
    return run_local(Path(run), read_manifest(Path(run)), Console(), command)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
