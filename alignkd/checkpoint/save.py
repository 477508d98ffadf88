"""Save a training run's state so that it counts whole or not at all, and keep as many as asked for.

The data position needs no state of its own: batches are a pure function of the optimizer step, which is the
checkpoint's name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from alignkd.checkpoint.layout import MARKER, checkpoints_folder, committed_steps, step_name
from alignkd.checkpoint.retention import expired_steps
from alignkd.checkpoint.storage import Storage
from alignkd.config.schema import CheckpointSection
from alignkd.engine.ranks import Ranks
from alignkd.errors import TrainingError

log = logging.getLogger(__name__)
SPACE_MARGIN = 1.05


class CheckpointSaver:
    """Saves of one run in one process. ``resumed_from`` is never removed; ``verified`` are the steps of older
    checkpoints that were found whole."""

    def __init__(
        self,
        run: Path,
        section: CheckpointSection,
        ranks: Ranks,
        storage: Storage,
        resumed_from: int | None,
        verified: Collection[int] = (),
    ) -> None:
        self._run = run
        self._section = section
        self._ranks = ranks
        self._storage = storage
        self._resumed_from = resumed_from
        self._verified = set(verified)
        self._size = 0  # bytes of the last checkpoint
        self._failures = 0
        if ranks.is_first:
            for name in storage.remove_leftovers(checkpoints_folder(run)):
                log.info("removed %s, left by a save that was cut off", name)
        ranks.barrier()  # nobody begins a save among folders that are being removed

    def save(self, engine: Any, step: int, facts: dict[str, Any]) -> bool:
        """Write and commit ``checkpoints/step-N``; False when it failed and the older ones stay.

        Collective. Raises TrainingError after ``checkpoint.max_failures`` failures in a row.
        """
        problem = self._write(engine, step, facts)
        if problem is None:
            self._failures = 0
            self._verified.add(step)
            self._remove_expired()
            return True
        self._failures += 1
        log.warning("checkpoint of step %d failed: %s", step, problem)
        if self._failures >= self._section.max_failures:
            raise TrainingError(
                f"{self._failures} checkpoints in a row could not be written, the last one at step {step}: "
                f"{problem}; the older ones are kept (checkpoint.max_failures)"
            )
        return False

    def _write(self, engine: Any, step: int, facts: dict[str, Any]) -> str | None:
        """The first rank's problem, known to all ranks; None when the checkpoint counts."""
        parent, storage = checkpoints_folder(self._run), self._storage
        partial, final = parent / (step_name(step) + ".tmp"), parent / step_name(step)
        needed = int(self._size * SPACE_MARGIN)
        written: list[Path] = []
        sealed: dict[str, dict[str, Any]] = {}
        # Each step ends with all ranks agreeing that it worked. That is also the barrier that closes a race:
        steps: list[Callable[[], None]] = [
            # nobody writes into a folder that is still being cleared
            self._on_first(lambda: storage.begin(partial, final, needed)),
            # nobody lists or publishes a folder that others still write into
            lambda: written.extend(storage.write_rank(engine, partial, self._ranks.rank)),
            lambda: sealed.update(storage.seal_rank(partial, written)),
            # nobody goes on, or exits, before the checkpoint counts
            lambda: self._commit(partial, final, step, facts, sealed),
        ]
        for action in steps:
            problem = self._agree(action)
            if problem is not None:
                self._agree(self._on_first(lambda: self._discard(partial, final)))
                return problem
        return None

    def _commit(
        self, partial: Path, final: Path, step: int, facts: dict[str, Any], sealed: dict[str, dict[str, Any]]
    ) -> None:
        files = {name: entry for part in self._ranks.gather_objects(sealed) for name, entry in part.items()}
        self._size = sum(entry["bytes"] for entry in files.values())
        if not self._ranks.is_first:
            return
        manifest = {
            "step": step,
            "world_size": self._ranks.world_size,
            **facts,
            "files": dict(sorted(files.items())),
        }
        self._storage.write_manifest(partial, manifest)
        self._storage.publish(partial, final)
        self._storage.mark(final)
        self._storage.write_latest(final)

    def _discard(self, partial: Path, final: Path) -> None:
        self._storage.remove(partial)
        if not (final / MARKER).exists():
            self._storage.remove(final)

    def _on_first(self, action: Callable[[], None]) -> Callable[[], None]:
        """``action`` on rank 0, nothing elsewhere."""
        return action if self._ranks.is_first else lambda: None

    def _agree(self, action: Callable[[], None]) -> str | None:
        """Run ``action`` on every rank; the first rank's OSError, as all ranks see it."""
        problem = None
        try:
            action()
        except OSError as error:
            problem = f"rank {self._ranks.rank}: {error}"
        return next((found for found in self._ranks.gather_objects(problem) if found is not None), None)

    def _remove_expired(self) -> None:
        if not self._ranks.is_first:
            return
        keep = {self._resumed_from} if self._resumed_from is not None else set()
        committed = committed_steps(self._run)
        for step in expired_steps(
            committed, self._verified, keep, self._section.keep_last, self._section.keep_every
        ):
            try:
                self._storage.remove(checkpoints_folder(self._run) / step_name(step))
            except OSError as error:
                log.warning("step-%d could not be removed: %s", step, error)
