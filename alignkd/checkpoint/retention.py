"""Which checkpoints may be removed, and their removal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path

from alignkd.checkpoint.storage import Storage
from alignkd.config.checkpoint_section import CheckpointSection
from alignkd.run_folder.best import best_checkpoint
from alignkd.run_folder.checkpoints import committed_steps, step_folder, universal_folder

log = logging.getLogger(__name__)


def remove_expired(
    run: Path,
    section: CheckpointSection,
    verified: Collection[int],
    resumed_from: int | None,
    storage: Storage,
    is_writer: Callable[[], bool] = lambda: True,
    best: str = "loss",
) -> None:
    """Remove checkpoints beyond ``checkpoint.keep_last`` and ``keep_every``, with their conversions; one that
    cannot be removed is logged. The one that the run was resumed from stays, and the best one by the value
    ``best``. Nothing more is removed once ``is_writer`` says that the run is another process's."""
    protected = set() if resumed_from is None else {resumed_from}
    try:
        found = best_checkpoint(run, best)
    except OSError as error:
        log.warning("no checkpoint is removed now: which one is the best cannot be told: %s", error)
        return
    protected |= set() if found is None else {found.step}
    for step in expired_steps(
        committed_steps(run), verified, protected, section.keep_last, section.keep_every
    ):
        if not is_writer():
            return
        try:
            storage.remove(universal_folder(run, step))
            storage.remove(step_folder(run, step))
        except OSError as error:
            log.warning("step-%d could not be removed: %s", step, error)


def expired_steps(
    committed: Collection[int],
    verified: Collection[int],
    protected: Collection[int],
    keep_last: int | None,
    keep_every: int | None,
) -> list[int]:
    """Steps to remove, oldest first. ``keep_last`` None keeps all.

    Only checkpoints that this process has verified count towards ``keep_last``, and only what is older than
    all of those is removed: a checkpoint that merely looks complete never displaces one that is.
    ``protected`` and multiples of ``keep_every`` stay.
    """
    newest = sorted(set(verified) & set(committed))[-keep_last:] if keep_last is not None else []
    if keep_last is None or len(newest) < keep_last:
        return []
    return sorted(
        step
        for step in committed
        if step < newest[0] and step not in protected and not (keep_every and step % keep_every == 0)
    )
