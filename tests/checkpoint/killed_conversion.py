"""Programs that are killed by SIGKILL during a conversion.

``python -m tests.checkpoint.killed_conversion convert STEP PHASE RUN [PHASE RUN ...]`` converts each run in a
child that is killed at its phase; ``... train RUN PHASE`` is a rank whose first one dies there.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepspeed.checkpoint import ds_to_universal

from alignkd.checkpoint.storage import Storage
from alignkd.checkpoint.universal import convert

PHASES = ("begin", "fragments", "parameters", "manifest", "publish", "mark")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillingStorage(Storage):
    def __init__(self, phase: str, fault: Callable[[], None] = die) -> None:
        assert phase in PHASES
        self._phase, self._fault, self._parts = phase, fault, 0
        if phase in ("fragments", "parameters"):
            self._write_part = ds_to_universal._save_checkpoint
            ds_to_universal._save_checkpoint = self.write_part

    def write_part(self, path: str, state: Any) -> None:
        """What DeepSpeed writes: a rank's fragments of parameters, later whole parameters."""
        self._parts += (self._phase == "parameters") == ("/zero/" in path)
        if self._parts == 10:
            self._fault()
        self._write_part(path, state)

    def _at(self, phase: str) -> None:
        if phase == self._phase:
            self._fault()

    def remove(self, folder: Path) -> None:
        self._at("begin")
        super().remove(folder)

    def write_manifest(self, partial: Path, manifest: dict[str, Any]) -> None:
        self._at("manifest")
        super().write_manifest(partial, manifest)

    def publish(self, partial: Path, final: Path) -> None:
        self._at("publish")
        super().publish(partial, final)

    def mark(self, final: Path) -> None:
        self._at("mark")
        super().mark(final)


def convert_each(step: int, cases: list[str]) -> int:
    """In children, so that DeepSpeed is imported once. Prints how each of them ended."""
    for phase, run in zip(cases[::2], cases[1::2], strict=True):
        child = os.fork()
        if child == 0:
            convert(Path(run), step, KillingStorage(phase))
            os._exit(0)
        print(phase, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return 0


def train_rank(run: Path, phase: str) -> int:
    from alignkd.distributed.ranks import start_ranks
    from alignkd.engine.setup import prepare
    from alignkd.run_folder.progress import Progress

    ranks = start_ranks()

    def die_while_the_others_wait() -> None:
        time.sleep(2)
        die()

    storage = KillingStorage(phase, die_while_the_others_wait) if ranks.is_first else Storage()
    prepare(run, ranks, Progress(run, writes=ranks.is_first), storage)
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        sys.exit(convert_each(int(sys.argv[2]), sys.argv[3:]))
    sys.exit(train_rank(Path(sys.argv[2]), sys.argv[3]))
