"""Every change that a save makes to the disk, one method per phase, so that tests can put faults between."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import (
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from alignkd.checkpoint.host_copy import host_copy
from alignkd.checkpoint.rank_state import rank_state, write_rank_state
from alignkd.errors import CheckpointError
from alignkd.run_folder.atomic_files import flush_to_disk, write_text_atomic
from alignkd.run_folder.checkpoints import MANIFEST, MARKER, UNIVERSAL, describe, step_folders

log = logging.getLogger(__name__)

# Without it DeepSpeed cannot convert a checkpoint of stages 1 and 2 for another number of ranks.
CLIENT_STATE = {
    UNIVERSAL_CHECKPOINT_INFO: {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}
}


class ShardFiles(TorchCheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's file access, with four differences.

    With ``copies`` set, a state is copied to host memory and written later, by :meth:`Storage.write_files`.
    A failed write is remembered instead of raised: ``save_checkpoint`` has barriers, and a rank that left it
    by an exception would leave the others waiting. Only files that were verified are unpickled, and they are
    mapped into memory instead of read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.zipfile_serialization = True
        self.verified: frozenset[Path] = frozenset()
        self.begin(copies=False)

    def begin(self, *, copies: bool) -> None:
        """Before each ``save_checkpoint``."""
        self._copies = copies
        self.written: list[Path] = []
        self.waiting: list[tuple[Path, Any]] = []  # copies, and where they go
        self.problem: OSError | None = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            super().makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.problem = error

    def save(self, state_dict: Any, path: str) -> None:
        if self.problem is not None:
            return
        if self._copies:
            try:
                self.waiting.append((Path(path), host_copy(state_dict)))
                return
            except (OSError, MemoryError, RuntimeError) as error:  # torch's allocators raise the last
                log.warning("no copy of %s (%s): it is written at once, and training waits", path, error)
        try:
            write_shard(state_dict, Path(path))
            self.written.append(Path(path))
        except OSError as error:
            self.problem = error

    def load(self, path: str, map_location: Any = None) -> Any:
        if Path(path) not in self.verified:
            raise CheckpointError(f"{path}: was not verified against a manifest")
        # Mapped: the ranks of a host read the model's weights from the same pages, where each would hold a
        # copy of the whole file. DeepSpeed keeps objects of its own in it, so it is no `weights_only` file.
        return torch.load(path, map_location=map_location, weights_only=False, mmap=True)


def write_shard(state: Any, path: Path) -> None:
    """As DeepSpeed writes it. Raises OSError, for torch's own writer on a full disk, too."""
    try:
        torch.save(state, path)
    except RuntimeError as error:
        raise OSError(errno.EIO, str(error).splitlines()[0], str(path)) from error


def attach(engine: Any) -> ShardFiles:
    """Let ``engine`` write and read its shards through :class:`ShardFiles`."""
    files = ShardFiles()
    engine.checkpoint_engine = files
    # Copies of conversion scripts, written by rank 0 alone without an error path.
    engine._copy_recovery_script = lambda _path: None
    return files


@dataclass(frozen=True)
class Shards:
    """What one rank has to write of a checkpoint."""

    partial: Path
    rank: int
    waiting: list[tuple[Path, Any]]  # copies in host memory, each dropped when it is written
    written: list[Path]
    rank_state: dict[str, Any]


class Storage:
    """The phases of a save, in their order. All raise OSError. ``snapshot_rank``, ``write_files`` and
    ``seal_rank`` run on every rank, the last two in a thread; the others on rank 0."""

    def begin(self, partial: Path, final: Path, needed_bytes: int) -> None:
        """An empty ``partial``, and room for the checkpoint."""
        partial.parent.mkdir(parents=True, exist_ok=True)
        self.remove(partial)
        if (final / MARKER).exists():  # passed over at the start, and now made again: kept, out of the way
            self.remove(final.with_suffix(".passed-over"))
            final.rename(final.with_suffix(".passed-over"))
        self.remove(final)
        free = shutil.disk_usage(partial.parent).free
        if free < needed_bytes:
            raise OSError(
                errno.ENOSPC, f"{free:,} bytes free, a checkpoint takes {needed_bytes:,}", str(partial)
            )
        partial.mkdir()

    def snapshot_rank(self, engine: Any, partial: Path, rank: int, *, copies: bool) -> Shards:
        """This rank's state as it is now. Collective inside DeepSpeed.

        With ``copies`` it is held in host memory; otherwise DeepSpeed's files are written here.
        """
        files = engine.checkpoint_engine
        assert isinstance(files, ShardFiles)
        files.begin(copies=copies)
        engine.save_checkpoint(
            str(partial.parent), tag=partial.name, client_state=dict(CLIENT_STATE), save_latest=False
        )
        waiting, written, problem = files.waiting, files.written, files.problem
        files.begin(copies=False)  # the copies are the caller's alone, and go when it is done with them
        if problem is not None:
            raise problem
        return Shards(partial, rank, waiting, written, rank_state())

    def write_files(self, shards: Shards) -> list[Path]:
        """Write what is not written yet; returns all files of this rank. May run in a thread."""
        written = list(shards.written)
        while shards.waiting:
            path, state = shards.waiting.pop(0)
            self.write_file(path, state)
            written.append(path)
        return [*written, write_rank_state(shards.partial, shards.rank, shards.rank_state)]

    def write_file(self, path: Path, state: Any) -> None:
        write_shard(state, path)

    def seal_rank(self, partial: Path, written: list[Path]) -> dict[str, dict[str, Any]]:
        """Flush this rank's files (no other host can) and read them back: name -> size and sha256. May run in
        a thread."""
        for path in written:
            flush_to_disk(path)
        names = [str(path.relative_to(partial)) for path in written]
        return {name: describe(partial, name) for name in names}

    def write_manifest(self, partial: Path, manifest: dict[str, Any]) -> None:
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        flush_to_disk(partial / MANIFEST)
        flush_to_disk(partial)

    def publish(self, partial: Path, final: Path) -> None:
        partial.rename(final)
        flush_to_disk(final.parent)

    def mark(self, final: Path) -> None:
        """From here on the checkpoint counts."""
        (final / MARKER).touch()
        flush_to_disk(final)

    def write_latest(self, final: Path) -> None:
        """The file by which other tools find the newest checkpoint; never read here."""
        write_text_atomic(final.parent / "latest", final.name, durable=False)

    def remove(self, folder: Path) -> None:
        """The marker goes first, so that a torn removal leaves nothing that counts."""
        if not folder.exists():
            return
        (folder / MARKER).unlink(missing_ok=True)
        flush_to_disk(folder)
        shutil.rmtree(folder)

    def remove_leftovers(self, parent: Path) -> list[str]:
        """Remove what killed saves and removals left behind; returns the names of what has gone."""
        leftovers = [path for path in sorted(parent.glob("step-*.tmp")) if path.is_dir()]
        conversions = sorted(parent.glob(f"step-*{UNIVERSAL}"))
        leftovers += [path for path in conversions if not (path.with_suffix("") / MARKER).exists()]
        # Without the marker: killed before it was set, or in a removal. Neither will ever count.
        leftovers += [path for path in step_folders(parent) if not (path / MARKER).exists()]
        removed = []
        for path in leftovers:
            try:
                self.remove(path)
                removed.append(path.name)
            except OSError as error:  # a writer that was given up may still be at it; it is in nobody's way
                log.warning("%s could not be removed: %s", path, error)
        return removed
