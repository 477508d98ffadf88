"""A storage that fails, or kills its process, at one phase of a save; and a rank program that uses it.

``python -m tests.checkpoint.faulty_storage RUN PHASE RANK STEP`` trains RUN and SIGKILLs rank RANK (``all``:
every rank that comes to it) at PHASE of the save of STEP.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignkd.checkpoint.storage import Storage

PHASES = (
    "begin",
    "shards",  # DeepSpeed's files are there, this rank's own are not
    "seal",
    "manifest",
    "publish",
    "mark",
    "latest",
    "removal",  # of an expired checkpoint, marker gone, files still there
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

    def write_rank(self, engine: Any, partial: Path, rank: int) -> list[Path]:
        self._saving = int(partial.name.removeprefix("step-").removesuffix(".tmp"))
        written = super().write_rank(engine, partial, rank)
        self._at("shards")
        return written

    def seal_rank(self, partial: Path, written: list[Path]) -> dict[str, dict[str, Any]]:
        self._at("seal")
        return super().seal_rank(partial, written)

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
            (folder / "COMMITTED").unlink(missing_ok=True)
            self._at("removal")
        super().remove(folder)


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def kill_this_rank() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(run: Path, phase: str, rank: str, step: int) -> int:
    from alignkd.engine.loop import train
    from alignkd.engine.progress import Progress
    from alignkd.engine.ranks import start_ranks
    from alignkd.engine.setup import prepare
    from alignkd.engine.signals import StopRequest

    ranks = start_ranks()
    hit = rank == "all" or ranks.rank == int(rank)
    storage = FaultyStorage(phase, step, kill_this_rank) if hit else Storage()
    progress = Progress(run, writes=ranks.is_first)
    return train(prepare(run, ranks, progress), StopRequest(), progress, storage)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])))
