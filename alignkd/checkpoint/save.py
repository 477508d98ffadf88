"""Save a training run's state so that it counts whole or not at all, and keep as many as asked for.

The data position needs no state of its own: batches are a pure function of the optimizer step, which is the
checkpoint's name.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignkd.checkpoint.background import BackgroundWrite, start_thread
from alignkd.checkpoint.commit import Save, SaveTotals, commit, discard
from alignkd.checkpoint.resume import CheckpointSearch
from alignkd.checkpoint.retention import remove_expired
from alignkd.checkpoint.storage import FileEntries, Shards, Storage
from alignkd.config.checkpoint_section import CheckpointSection
from alignkd.distributed.ranks import Ranks
from alignkd.errors import TakenOverError, TrainingError
from alignkd.run_folder.checkpoints import new_attempt, read_manifest, step_folder, step_name, stored_bytes
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.writer_lock import taken_over

log = logging.getLogger(__name__)
SPACE_MARGIN = 1.05
WRITE_SECONDS = 3600.0  # well before the process group's own limit, which would end the run
CLOSE_SECONDS = 60.0  # for a write that is no longer wanted
REMOVAL_SECONDS = 10.0  # for a removal at the end, whose rest the next start removes


class CheckpointSaver:
    """Saves of one run in one process, at most one in flight. ``found``: what the run was resumed from."""

    def __init__(
        self,
        run: Path,
        section: CheckpointSection,
        ranks: Ranks,
        storage: Storage,
        found: CheckpointSearch,
        sync_rows: Callable[[], None] = lambda: None,
        is_writer: Callable[[], bool] = lambda: True,
        generation: int = 0,
        best: str = "loss",
    ) -> None:
        """All on rank 0: ``sync_rows`` flushes the metrics rows to the disk or raises OSError; ``is_writer``
        says whether this process may still write the run, as its writer of ``generation``. ``best``: the
        value on held-out data whose best checkpoint is kept. Collective.

        Raises TakenOverError on all ranks when it may not.
        """
        self._run = run
        self._section = section
        self._ranks = ranks
        self._storage = storage
        self._sync_rows = sync_rows
        self._is_writer = is_writer
        self._best = best
        self._resumed_from = found.step
        self._verified = set(found.verified)
        self._refused = found.refused_steps
        self._failures = 0
        self._saves = 0  # begun, the same on all ranks
        self._save: Save | None = None
        self._write: BackgroundWrite | None = None
        self._removal: threading.Thread | None = None  # of expired checkpoints, on rank 0
        self.newest = found.step or 0  # committed step
        # Of the checkpoint that was resumed from, so that the first save knows what room it needs.
        known = ranks.is_first and found.step is not None
        size = stored_bytes(read_manifest(step_folder(run, found.step or 0))) if known else 0
        self.totals = SaveTotals(bytes=size)
        # Nobody begins a save among folders that are being removed, and all ranks write into the same folder.
        if problem := self._agree(self._on_first(self._remove_leftovers)):
            log.warning("what earlier saves left is not removed: %s", problem)
        self._attempt: str = ranks.broadcast_object(new_attempt(generation) if ranks.is_first else None)

    @property
    def in_flight(self) -> bool:
        """The same on all ranks."""
        return self._save is not None

    @property
    def written(self) -> bool:
        """This rank has nothing left to write, so that nobody would wait for it in :meth:`finish`."""
        return self._write is None or self._write.done

    @property
    def taken_over(self) -> TakenOverError | None:
        """Why this process must stop writing, or None. Known on rank 0 only."""
        lost = self._ranks.is_first and not self._is_writer()
        return taken_over(self._run) if lost else None

    def save(self, engine: Any, step: int, facts: dict[str, Any], *, wait: bool) -> None:
        """Take the state of ``step`` and write it, in a thread while training continues unless ``wait`` or
        the configuration says otherwise. It counts once :meth:`finish` has committed it. Collective.

        A save that fails leaves the older ones. Raises TrainingError after ``checkpoint.max_failures`` in
        a row.
        """
        self.finish()  # one at a time: a second copy of the state would not fit, and commits keep their order
        background = self._section.asynchronous and not wait
        self._saves += 1  # a step that is saved again must not meet its first writer, if that was given up
        name = f"{self._attempt}-{self._saves}"
        save = Save.of_step(self._run, step, name, facts, asynchronous=background)
        started = time.monotonic()
        shards: list[Shards] = []
        needed = int(self.totals.bytes * SPACE_MARGIN)
        # Each part of a save ends with all ranks agreeing that it worked. That is also the barrier that
        # closes a race: nobody writes into a folder that is still being cleared,
        problem = self._agree(self._on_first(lambda: self._begin(save, needed))) or self._agree(
            # and nobody starts a writer for a save that another rank has given up.
            lambda: shards.append(
                self._storage.snapshot_rank(engine, save.partial, self._ranks.rank, copies=background)
            )
        )
        save.held_seconds = save.snapshot_seconds = time.monotonic() - started
        if problem is not None:
            self._fail(save, problem)
            return
        self._save = save
        self._write = BackgroundWrite(lambda: self._write_and_flush(save.partial, shards.pop()))
        if not background:
            self.finish()

    def finish(self) -> None:
        """Wait for the save in flight, if there is one, and commit it. Collective."""
        save, write = self._save, self._write
        if save is None or write is None:
            return
        self._save = self._write = None
        started = time.monotonic()
        own_files, own_problem = write.result(WRITE_SECONDS)
        # Nobody lists or publishes a folder that others still write into.
        answers = self._ranks.gather_objects((own_files, own_problem, write.seconds))
        problem = next(
            (f"rank {rank}: {found}" for rank, (_, found, _) in enumerate(answers) if found is not None), None
        )
        files = {name: entry for part, _, _ in answers for name, entry in part.items()}
        write_seconds = max(seconds for _, _, seconds in answers)
        if problem is None:
            held = save.held_seconds + time.monotonic() - started
            # Nobody continues, or exits, before the checkpoint counts.
            problem = self._agree(self._on_first(lambda: self._commit(save, files, write_seconds, held)))
        if problem is not None:
            self._fail(save, problem)
            return
        self._failures = 0
        self.newest = save.step
        self._verified.add(save.step)
        if self._ranks.is_first:
            # Thousands of files: training does not wait for that.
            self._removal = start_thread("checkpoint-removal", self._remove_expired)
        held = save.held_seconds + time.monotonic() - started
        size = sum(entry["bytes"] for entry in files.values())
        self.totals = self.totals.plus_committed(held, write_seconds, size)
        log.info(
            "saved %s: %.1f MB, written in %.2f s, training held for %.2f s",
            step_name(save.step),
            size / 1e6,
            write_seconds,
            held,
        )

    def close(self) -> None:
        """End without a commit. Not collective: ranks may come here for reasons of their own."""
        if self._write is not None:
            self._write.wait(CLOSE_SECONDS)  # an interpreter that ends below a running writer may crash
        if self._removal is not None:
            self._removal.join(REMOVAL_SECONDS)

    def stop_unless_writer(self) -> None:
        """Another job may have taken this one for dead. Whatever lies in the folder is then the other's.
        Collective."""
        self._agree(self._on_first(lambda: None))

    def require_writer(self) -> None:
        """On rank 0, before each change to the run folder. Raises TakenOverError."""
        if not self._is_writer():
            raise taken_over(self._run)

    def _remove_leftovers(self) -> None:
        self._storage.pass_over_all([step_folder(self._run, step) for step in self._refused])
        for name in self._storage.remove_leftovers(RunPaths(self._run).checkpoints):
            log.info("removed %s, which an interrupted save or removal left", name)

    def _begin(self, save: Save, needed_bytes: int) -> None:
        if self._removal is not None:
            self._removal.join()  # the room that it makes may be needed
        self._storage.begin(save.partial, save.final, needed_bytes)

    def _remove_expired(self) -> None:
        """In a thread. No other one changes what it reads: the next save waits for it."""
        remove_expired(
            self._run,
            self._section,
            self._verified,
            self._resumed_from,
            self._storage,
            self._is_writer,
            self._best,
        )

    def _write_and_flush(self, partial: Path, shards: Shards) -> FileEntries:
        """In the writer's thread."""
        return self._storage.flush_and_hash(partial, self._storage.write_files(shards))

    def _commit(self, save: Save, files: FileEntries, write_seconds: float, held_seconds: float) -> None:
        size = self._ranks.world_size
        storage, sync_rows, require_writer = self._storage, self._sync_rows, self.require_writer
        commit(save, files, write_seconds, held_seconds, size, storage, sync_rows, require_writer)

    def _fail(self, save: Save, problem: str) -> None:
        """Collective; ``problem`` is the same on all ranks."""
        self._agree(self._on_first(lambda: discard(save, self._storage)))
        self._failures += 1
        self.totals = self.totals.plus_failed()
        log.warning("checkpoint of step %d failed: %s", save.step, problem)
        if self._failures >= self._section.max_failures:
            raise TrainingError(
                f"{self._failures} checkpoints in a row could not be written, the last one at step "
                f"{save.step}: {problem}; the older ones are kept (checkpoint.max_failures)"
            )

    def _on_first(self, action: Callable[[], None]) -> Callable[[], None]:
        """``action`` on rank 0, if the run is still this process's; nothing elsewhere."""

        def act() -> None:
            self.require_writer()
            action()

        return act if self._ranks.is_first else lambda: None

    def _agree(self, action: Callable[[], None]) -> str | None:
        """Run ``action`` on every rank; the first rank's OSError, as all ranks see it. A TakenOverError is
        raised on all of them."""
        problem, lost = None, None
        try:
            action()
        except TakenOverError as error:
            lost = error
        except OSError as error:
            problem = f"rank {self._ranks.rank}: {error}"
        answers = self._ranks.gather_objects((problem, lost is not None))
        if any(is_lost for _, is_lost in answers):
            self._ranks.raise_together(lost)
        return next((found for found, _ in answers if found is not None), None)
