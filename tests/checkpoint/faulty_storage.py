"""A storage that fails or kills processes in one phase of a save, and a rank program that uses it.

``python -m tests.checkpoint.faulty_storage RUN PHASE RANK VICTIM STEP`` is ``alignkd.train RUN``, except that
rank RANK sends SIGKILL to VICTIM (itself, all ranks, or their parent) at PHASE of the save of STEP.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from alignkd.checkpoint.storage import Shards, Storage
from alignkd.run_folder.checkpoints import partial_folder

PHASES = (
    "begin",
    "snapshot",  # taken; nothing of this rank is written when the save is asynchronous
    "between",  # two files of this rank
    "shards",  # all files of this rank are there, not yet flushed
    "flush",
    "manifest",
    "publish",
    "mark",
    "latest",
    "removal",  # of an expired checkpoint: renamed, files still there
)


class FaultyStorage(Storage):
    """Calls ``fault`` when the save of ``step`` reaches ``phase`` on this rank."""

    def __init__(self, phase: str, step: int, fault: Callable[[], None]) -> None:
        assert phase in PHASES
        self._phase, self._step, self._fault = phase, step, fault
        self._saving = -1

    def _at(self, phase: str) -> None:
        if phase == self._phase and self._saving == self._step:
            self._fault()

    def begin(self, partial: Path, final: Path, needed_bytes: int) -> None:
        self._saving = int(final.name.removeprefix("step-"))
        self._at("begin")
        super().begin(partial, final, needed_bytes)

    def snapshot_rank(self, engine: Any, partial: Path, rank: int, *, copies: bool) -> Shards:
        self._saving = int(partial.name.removeprefix("step-").split(".")[0])
        shards = super().snapshot_rank(engine, partial, rank, copies=copies)
        self._at("snapshot")
        return shards

    def write_file(self, path: Path, state: Any) -> None:
        super().write_file(path, state)
        self._at("between")

    def write_files(self, shards: Shards) -> list[Path]:
        written = super().write_files(shards)
        self._at("shards")
        return written

    def flush_and_hash(self, partial: Path, written: list[Path]) -> dict[str, dict[str, Any]]:
        self._at("flush")
        return super().flush_and_hash(partial, written)

    def write_manifest(self, partial: Path, manifest: dict[str, Any]) -> None:
        self._at("manifest")
        super().write_manifest(partial, manifest)

    def publish(self, partial: Path, final: Path) -> None:
        self._at("publish")
        super().publish(partial, final)

    def mark(self, final: Path) -> None:
        self._at("mark")
        super().mark(final)

    def write_latest(self, final: Path) -> None:
        self._at("latest")
        super().write_latest(final)

    def remove(self, folder: Path) -> None:
        if folder.exists() and folder.suffix != ".tmp":
            folder = folder.rename(partial_folder(folder, "removal"))
            self._at("removal")
        super().remove(folder)


def disk_full() -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


VICTIMS = ("rank", "all", "parent")


def kill(victim: str) -> None:
    """From a rank that the local back end started."""
    if victim == "parent":
        os.kill(os.getppid(), signal.SIGKILL)  # and the kernel ends the ranks
        time.sleep(60)  # nothing more comes from this thread, whenever that happens
    if victim == "all":
        for sibling in children(os.getppid()):
            if sibling != os.getpid():
                os.kill(sibling, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def children(parent: int) -> list[int]:
    """Process ids."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(path.parent.name))
    return found


def main(run: str, phase: str, rank: str, victim: str, step: str) -> int:
    from alignkd.engine import trainer
    from alignkd.train import main as train

    if os.environ["RANK"] == rank:
        faulty = FaultyStorage(phase, int(step), lambda: kill(victim))
        trainer.Storage = lambda: faulty  # type: ignore[assignment,misc]
    return train([run])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
