"""``alignkd resume --step N``: newer checkpoints are set aside, under names that do not count."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from alignkd.errors import UserError
from alignkd.run_folder.atomic_files import write_text_atomic
from alignkd.run_folder.checkpoints import (
    SET_ASIDE,
    committed_steps,
    free_name,
    step_folder,
    universal_folder,
)
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.writer_lock import WriterLock


@dataclass
class Rollback:
    """What was changed to let the next start resume from ``step`` (None: nothing)."""

    run: Path
    step: int | None
    moved: list[tuple[Path, Path]]  # before, after; the newest first
    result: str | None  # of a finished run: the text of the file that was removed
    metrics: tuple[int, int, int] | None  # the state of the metrics file

    @property
    def set_aside(self) -> list[str]:
        """The new names; renamed back by hand they count again."""
        return [place.name for _, place in self.moved]

    def undo(self, note: Callable[[str], None]) -> None:
        """Put everything back, unless the run has been trained from ``step`` since: its later metrics rows
        are gone then, and the later checkpoints are of another course of the run."""
        if self.step is None or self._has_begun():
            return
        try:
            with WriterLock(self.run, note):  # ranks of the start that failed may live on
                self.put_back()
        except UserError as error:
            note(f"{', '.join(self.set_aside) or 'the run'}: not put back: {error}")
        else:
            note(f"undone: the rollback to step {self.step}")

    def put_back(self) -> None:
        for folder, place in self.moved:
            place.rename(folder)
        result = RunPaths(self.run).result
        if self.result is not None and not result.exists():
            write_text_atomic(result, self.result)

    def _has_begun(self) -> bool:
        """Trained as far as a checkpoint or, at the least, cut the metrics rows."""
        newest = max(committed_steps(self.run), default=0)
        return newest > (self.step or 0) or _signature(RunPaths(self.run).metrics) != self.metrics


@contextlib.contextmanager
def rollback_to(run: Path, step: int | None, note: Callable[[str], None]) -> Iterator[Rollback]:
    """Let the next start resume from ``step`` (None: from the newest). The start cuts the metrics rows after
    it. The caller holds the writer lock when this begins, and no longer when it ends. Undone when the block
    fails."""
    result = RunPaths(run).result
    text = result.read_text(encoding="utf-8") if step is not None and result.exists() else None
    done = Rollback(run, step, [], text, _signature(RunPaths(run).metrics))
    try:
        if step is not None:
            _set_aside(run, step, done.moved)
            result.unlink(missing_ok=True)
    except BaseException:
        done.put_back()
        raise
    try:
        yield done
    except BaseException:
        done.undo(note)
        raise


def _set_aside(run: Path, step: int, moved: list[tuple[Path, Path]]) -> None:
    """Rename the checkpoints after ``step``, the newest first, and add them to ``moved``."""
    for newer in [other for other in committed_steps(run) if other > step]:
        folder = step_folder(run, newer)
        shutil.rmtree(universal_folder(run, newer), ignore_errors=True)  # can be made again
        place = free_name(folder, SET_ASIDE)
        folder.rename(place)
        moved.append((folder, place))


def _signature(path: Path) -> tuple[int, int, int] | None:
    """It changes when the file is replaced or appended to."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
