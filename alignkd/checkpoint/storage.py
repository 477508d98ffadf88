"""Every change that a save makes to the disk, one method per phase, so that tests can put faults between."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed.checkpoint.constants import (
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)

from alignkd.checkpoint.rank_state import rank_state, write_rank_state
from alignkd.checkpoint.shard_files import shard_files, write_shard
from alignkd.run_folder.atomic_files import flush_to_disk, write_text_atomic
from alignkd.run_folder.checkpoints import (
    MANIFEST,
    MARKER,
    PARTIAL,
    PASSED_OVER,
    UNIVERSAL,
    UNMARKED,
    free_name,
    has_manifest,
    is_marked,
    marker_text,
    new_attempt,
    partial_folder,
    step_folders,
)
from alignkd.run_folder.patience import Patience
from alignkd.run_folder.verification import describe

log = logging.getLogger(__name__)

# Without it DeepSpeed cannot convert a checkpoint of stages 1 and 2 for another number of ranks.
CLIENT_STATE = {
    UNIVERSAL_CHECKPOINT_INFO: {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}
}
FileEntries = dict[str, dict[str, Any]]  # relative name -> size and sha256, as a manifest has them


@dataclass(frozen=True)
class Shards:
    """What one rank has to write of a checkpoint."""

    partial: Path
    rank: int
    waiting: list[tuple[Path, Any]]  # copies in host memory, each dropped when it is written
    written: list[Path]
    rank_state: dict[str, Any]


class Storage:
    """The phases of a save, in their order; all raise OSError. ``snapshot_rank``, ``write_files`` and
    ``flush_and_hash`` run on every rank, the last two in a thread; the others on rank 0."""

    def begin(self, partial: Path, final: Path, needed_bytes: int) -> None:
        """An empty ``partial``, and room for the checkpoint."""
        partial.parent.mkdir(parents=True, exist_ok=True)
        self.remove(partial)
        if is_marked(final):  # it would be in the way, and nobody has asked to remove it
            self.pass_over(final)
        if os.path.lexists(final):
            self.clear(final)
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
        files = shard_files(engine)
        files.begin(copies=copies)
        engine.save_checkpoint(
            str(partial.parent), tag=partial.name, client_state=dict(CLIENT_STATE), save_latest=False
        )
        waiting, written, problem = files.waiting, files.written, files.problem
        files.begin(copies=False)  # the copies are the caller's alone, and are freed when it drops them
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

    def flush_and_hash(self, partial: Path, written: list[Path]) -> FileEntries:
        """Flush this rank's files (no other host can) and read them back. May run in a thread."""
        for path in written:
            flush_to_disk(path)
        names = [str(path.relative_to(partial)) for path in written]
        return {name: describe(partial, name) for name in names}

    def check_visible(self, partial: Path, files: FileEntries, patience: Patience) -> None:
        """Whether rank 0 sees what all ranks say they have written, at once or before its ``patience`` is
        used up. A rank that has another file system mounted there writes where no other start would find it.
        """
        for name, entry in files.items():
            size = _awaited_size(partial / name, entry["bytes"], patience)
            if size != entry["bytes"]:
                found = "does not see it" if size is None else f"sees {size:,} bytes"
                raise OSError(
                    errno.ENOENT,
                    f"a rank wrote {entry['bytes']:,} bytes and rank 0 {found}; are the checkpoints on a "
                    "file system that all ranks share?",
                    str(partial / name),
                )

    def write_manifest(self, partial: Path, manifest: dict[str, Any]) -> None:
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        flush_to_disk(partial / MANIFEST)
        flush_to_disk(partial)

    def publish(self, partial: Path, final: Path) -> None:
        partial.rename(final)
        flush_to_disk(final.parent)

    def mark(self, final: Path) -> None:
        """From here on the checkpoint counts. The marker is not empty, so that no clean-up of empty files
        takes it."""
        write_text_atomic(final / MARKER, marker_text(final))

    def write_latest(self, final: Path) -> None:
        """The file by which other tools find the newest checkpoint; never read here."""
        write_text_atomic(final.parent / "latest", final.name, durable=False)

    def remove(self, folder: Path) -> None:
        """Renamed first, so that an interrupted removal leaves nothing that counts. Of a link to a folder
        elsewhere only the link is removed: what it points to was put there by a user."""
        if not os.path.lexists(folder):
            return
        if folder.is_symlink():
            log.warning("%s is a link: it is removed, %s stays", folder, folder.resolve())
            folder.unlink()
            return
        if folder.suffix != PARTIAL:
            doomed = partial_folder(folder, new_attempt())
            folder.rename(doomed)
            flush_to_disk(folder.parent)
            folder = doomed
        shutil.rmtree(folder)

    def pass_over(self, folder: Path) -> str:
        """Put a marked checkpoint that cannot be used aside, so that nobody takes it for the newest one.
        Returns its new name."""
        place = free_name(folder, PASSED_OVER)
        folder.rename(place)
        flush_to_disk(folder.parent)
        return place.name

    def pass_over_all(self, folders: list[Path]) -> None:
        """:meth:`pass_over` for each. One that cannot be renamed stays, and is refused again."""
        for folder in folders:
            try:
                log.warning("%s is kept as %s", folder.name, self.pass_over(folder))
            except OSError as error:
                log.warning("%s could not be put aside: %s", folder, error)

    def clear(self, folder: Path) -> Path | None:
        """Free the name of an unmarked ``step-N``. One with a manifest was complete once: it is put aside
        under the name that is returned. Anything else is removed."""
        if not has_manifest(folder):
            self.remove(folder)
            return None
        place = free_name(folder, UNMARKED)
        folder.rename(place)
        flush_to_disk(folder.parent)
        log.warning("%s has a manifest but no marker %s: kept as %s", folder, MARKER, place.name)
        return place

    def remove_leftovers(self, parent: Path) -> list[str]:
        """Remove what killed saves and removals left behind; returns the names of what is gone."""
        leftovers = [path for path in sorted(parent.glob(f"step-*{PARTIAL}")) if path.is_dir()]
        conversions = sorted(parent.glob(f"step-*{UNIVERSAL}"))
        leftovers += [path for path in conversions if not (path.with_suffix("") / MARKER).exists()]
        # Without the marker: the save was killed before it was set, or the marker was lost since.
        unmarked = [path for path in step_folders(parent) if not is_marked(path)]
        removed = []
        for path in leftovers + unmarked:
            try:
                if path not in unmarked:
                    self.remove(path)
                elif self.clear(path) is not None:
                    continue
                removed.append(path.name)
            except OSError as error:  # a writer that was given up may still write there, which is harmless
                log.warning("%s could not be removed: %s", path, error)
        return removed


def _awaited_size(path: Path, expected: int, patience: Patience) -> int | None:
    """Bytes of a file that should have ``expected``; None when it is not there."""

    def size() -> int | None:
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return None

    if size() != expected:  # a look at the folder for every file would be many of them
        patience.until_exists(path)
        patience.until(lambda: size() == expected)
    return size()
