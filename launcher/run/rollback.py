"""``alignkd resume --step N``: newer checkpoints are put aside, under names that do not count."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from alignkd.run_folder.atomic_files import write_text_atomic
from alignkd.run_folder.checkpoints import (
    SET_ASIDE,
    committed_steps,
    free_name,
    step_folder,
    universal_folder,
)
from alignkd.run_folder.paths import RunPaths


@contextlib.contextmanager
def rollback_to(run: Path, step: int | None) -> Iterator[list[str]]:
    """Let the next start resume from ``step`` (None: from the newest).

    Gives the new names of the newer checkpoints; renamed back by hand they count again. The result of a
    finished run is removed; the start cuts the metrics rows after the step. All of it is undone when the
    block fails.
    """
    moved = [] if step is None else _set_aside(run, step)
    result = RunPaths(run).result
    text = result.read_text(encoding="utf-8") if step is not None and result.exists() else None
    if text is not None:
        result.unlink()
    try:
        yield [place.name for _, place in moved]
    except BaseException:
        if not any(folder.exists() for folder, _ in moved):  # otherwise it did start, and has trained further
            for folder, place in moved:
                place.rename(folder)
            if text is not None and not result.exists():
                write_text_atomic(result, text)
        raise


def _set_aside(run: Path, step: int) -> list[tuple[Path, Path]]:
    """Rename the checkpoints after ``step``, the newest first: (before, after)."""
    moved = []
    for newer in [other for other in committed_steps(run) if other > step]:
        folder = step_folder(run, newer)
        shutil.rmtree(universal_folder(run, newer), ignore_errors=True)  # can be made again
        place = free_name(folder, SET_ASIDE)
        folder.rename(place)
        moved.append((folder, place))
    return moved
