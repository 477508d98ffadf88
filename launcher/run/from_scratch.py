"""``alignkd resume --from-scratch``: what the records say about earlier saves no longer stops a start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from alignkd.run_folder.atomic_files import write_text_atomic
from alignkd.run_folder.checkpoints import free_name
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.saved_steps import give_up_text
from launcher.run.attempts import open_attempt, read_history

GIVEN_UP = ".jsonl.given-up"


@contextlib.contextmanager
def saves_given_up(run: Path, wanted: bool) -> Iterator[str | None]:
    """Let the next start train from step 0 although the records know of saves. Nothing is deleted: gives the
    new name of the metrics, if there were any. Undone when the block fails before the run has written anew.
    """
    if not wanted:
        yield None
        return
    paths = RunPaths(run)
    before = {path: _text(path) for path in (paths.from_scratch, paths.progress)}
    last = open_attempt(run)
    number = max((attempt.number for attempt in [*read_history(run), *([last] if last else [])]), default=0)
    write_text_atomic(paths.from_scratch, give_up_text(number))
    paths.progress.unlink(missing_ok=True)
    place = free_name(paths.metrics, GIVEN_UP) if paths.metrics.exists() else None
    if place is not None:
        paths.metrics.rename(place)
    try:
        yield None if place is None else place.name
    except BaseException:
        if not paths.metrics.exists() and not paths.progress.exists():
            for path, text in before.items():
                path.unlink(missing_ok=True)
                if text is not None:
                    write_text_atomic(path, text)
            if place is not None:
                place.rename(paths.metrics)
        raise


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None
