"""Every change that a save makes to the disk, one method per phase, so that tests can put faults between."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from alignkd.checkpoint.layout import MANIFEST, MARKER, describe, flush_to_disk
from alignkd.checkpoint.rank_state import save_rank_state
from alignkd.errors import CheckpointError


class ShardFiles(TorchCheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's file access, with two differences.

    A failed write is remembered instead of raised: ``save_checkpoint`` has barriers, and a rank that left it
    by an exception would leave the others waiting. And only files that were verified are unpickled.
    """

    def __init__(self) -> None:
        super().__init__()
        self.zipfile_serialization = True
        self.written: list[Path] = []
        self.problem: OSError | None = None
        self.verified: frozenset[Path] = frozenset()

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            super().makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.problem = error

    def save(self, state_dict: Any, path: str) -> None:
        if self.problem is not None:
            return
        try:
            super().save(state_dict, path)
            self.written.append(Path(path))
        except OSError as error:
            self.problem = error
        except RuntimeError as error:  # torch's own writer, on a full disk
            self.problem = OSError(errno.EIO, str(error).splitlines()[0], path)

    def load(self, path: str, map_location: Any = None) -> Any:
        if Path(path) not in self.verified:
            raise CheckpointError(f"{path}: was not verified against a manifest")
        return super().load(path, map_location=map_location)


def attach(engine: Any) -> ShardFiles:
    """Let ``engine`` write and read its shards through :class:`ShardFiles`."""
    files = ShardFiles()
    engine.checkpoint_engine = files
    # Copies of conversion scripts, written by rank 0 alone without an error path.
    engine._copy_recovery_script = lambda _path: None
    return files


class Storage:
    """The phases of a save, in their order. All raise OSError; ``write_rank`` and ``seal_rank`` run on every
    rank, the others on rank 0."""

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

    def write_rank(self, engine: Any, partial: Path, rank: int) -> list[Path]:
        """Write what belongs to this rank; returns its files. Collective inside DeepSpeed."""
        files = engine.checkpoint_engine
        assert isinstance(files, ShardFiles)
        files.written, files.problem = [], None
        engine.save_checkpoint(str(partial.parent), tag=partial.name, save_latest=False)
        if files.problem is not None:
            raise files.problem
        return files.written + save_rank_state(partial, rank)

    def seal_rank(self, partial: Path, written: list[Path]) -> dict[str, dict[str, Any]]:
        """Flush this rank's files (no other host can) and read them back: name -> size and sha256."""
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
        temporary = final.parent / "latest.tmp"
        temporary.write_text(final.name, encoding="utf-8")
        temporary.replace(final.parent / "latest")

    def remove(self, folder: Path) -> None:
        """The marker goes first, so that a torn removal leaves nothing that counts."""
        if not folder.exists():
            return
        (folder / MARKER).unlink(missing_ok=True)
        flush_to_disk(folder)
        shutil.rmtree(folder)

    def remove_leftovers(self, parent: Path) -> list[str]:
        """Remove what killed saves left behind; returns the names."""
        leftovers = [path for path in sorted(parent.glob("step-*.tmp")) if path.is_dir()]
        for path in leftovers:
            self.remove(path)
        return [os.fspath(path.name) for path in leftovers]
