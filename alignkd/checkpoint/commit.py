"""One save, from its beginning to the commit, and the totals of a process. Every rank has them; rank 0 alone
commits and discards."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignkd.checkpoint.storage import FileEntries, Storage
from alignkd.run_folder.checkpoints import is_marked, partial_folder, step_folder
from alignkd.run_folder.patience import PATIENCE_SECONDS, Patience
from alignkd.run_folder.save_times import TIMING

log = logging.getLogger(__name__)


@dataclass
class Save:
    """A save that has begun and is not committed."""

    step: int
    facts: dict[str, Any]  # for the manifest
    partial: Path
    final: Path
    asynchronous: bool
    snapshot_seconds: float = 0.0  # until training may continue
    held_seconds: float = 0.0  # training stood still for it

    @classmethod
    def of_step(cls, run: Path, step: int, attempt: str, facts: dict[str, Any], asynchronous: bool) -> Save:
        final = step_folder(run, step)
        return cls(step, facts, partial_folder(final, attempt), final, asynchronous)


@dataclass(frozen=True)
class SaveTotals:
    """Of this process."""

    committed: int = 0
    failed: int = 0
    held_seconds: float = 0.0  # committed saves held the training loop
    write_seconds: float = 0.0  # the slowest rank's writing, flushing and hashing, summed over saves
    bytes: int = 0  # of the last one

    def plus_failed(self) -> SaveTotals:
        return replace(self, failed=self.failed + 1)

    def plus_committed(self, held_seconds: float, write_seconds: float, size: int) -> SaveTotals:
        return replace(
            self,
            committed=self.committed + 1,
            held_seconds=self.held_seconds + held_seconds,
            write_seconds=self.write_seconds + write_seconds,
            bytes=size,
        )


def commit(
    save: Save,
    files: FileEntries,
    write_seconds: float,
    held_seconds: float,
    world_size: int,
    storage: Storage,
    sync_rows: Callable[[], None],
    require_writer: Callable[[], None] = lambda: None,
) -> None:
    """Make a save count whose ``files`` all ranks have written and flushed. Raises OSError, and what
    ``require_writer`` raises when the run is another process's by then.

    The order is the protocol: a look at all files, metrics rows, manifest, name, marker. Whatever interrupts
    it leaves a folder that does not count, or a checkpoint that is complete.
    """
    storage.check_visible(save.partial, files, Patience(PATIENCE_SECONDS))
    sync_rows()  # a resume does not repeat the steps before the checkpoint, nor write their rows again
    manifest = {
        "step": save.step,
        "world_size": world_size,
        **save.facts,
        TIMING: {
            "asynchronous": save.asynchronous,
            "held_seconds": held_seconds,
            "save_seconds": save.snapshot_seconds + write_seconds,
        },
        "files": dict(sorted(files.items())),
    }
    storage.write_manifest(save.partial, manifest)
    require_writer()  # the disk may have taken its time, and these names are the other process's too
    storage.publish(save.partial, save.final)
    require_writer()
    storage.mark(save.final)
    try:
        storage.write_latest(save.final)
    except OSError as error:  # the checkpoint counts all the same
        log.warning("%s: %s", save.final.parent, error)


def discard(save: Save, storage: Storage) -> None:
    """Remove what a failed save has left. Raises OSError."""
    if save.partial.exists():  # not renamed: whatever has the final name is not of this save
        storage.remove(save.partial)
    elif not is_marked(save.final):
        storage.remove(save.final)
