"""Save a training run's state so that it counts whole or not at all, and keep as many as asked for.

The data position needs no state of its own: batches are a pure function of the optimizer step, which is the
checkpoint's name.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignkd.checkpoint.background import BackgroundWrite, Sealed
from alignkd.checkpoint.resume import Found
from alignkd.checkpoint.retention import expired_steps
from alignkd.checkpoint.storage import Shards, Storage
from alignkd.config.schema import CheckpointSection
from alignkd.distributed.ranks import Ranks
from alignkd.errors import TakenOverError, TrainingError
from alignkd.run_folder.checkpoints import (
    MARKER,
    committed_steps,
    new_attempt,
    partial_name,
    read_manifest,
    step_name,
    universal_name,
)
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.save_times import TIMING

log = logging.getLogger(__name__)
SPACE_MARGIN = 1.05
CLOSE_SECONDS = 60.0  # for a write that is no longer wanted


@dataclass
class _Flight:
    """A save that has begun and is not committed."""

    step: int
    facts: dict[str, Any]
    partial: Path
    final: Path
    asynchronous: bool
    snapshot_seconds: float = 0.0  # until training may go on
    held_seconds: float = 0.0  # training stood still for it


@dataclass(frozen=True)
class SaveTotals:
    """Of this process."""

    committed: int = 0
    failed: int = 0
    held_seconds: float = 0.0  # the training loop was held by committed saves
    write_seconds: float = 0.0  # the slowest rank's writing, flushing and hashing, summed over saves
    bytes: int = 0  # of the last one


class CheckpointSaver:
    """Saves of one run in one process, at most one in flight. ``found``: what the run was resumed from."""

    def __init__(
        self,
        run: Path,
        section: CheckpointSection,
        ranks: Ranks,
        storage: Storage,
        found: Found,
        sync_rows: Callable[[], None] = lambda: None,
        is_writer: Callable[[], bool] = lambda: True,
    ) -> None:
        """Both on rank 0: ``sync_rows`` puts the metrics rows on the disk or raises OSError; ``is_writer``
        says whether the run is still its to write."""
        self._run = run
        self._section = section
        self._ranks = ranks
        self._storage = storage
        self._sync_rows = sync_rows
        self._is_writer = is_writer
        self._resumed_from = found.step
        self._verified = set(found.verified)
        self._failures = 0
        self._flight: _Flight | None = None
        self._write: BackgroundWrite | None = None
        self.newest = found.step or 0  # committed step
        self.totals = SaveTotals(bytes=_bytes_of(run, found.step))
        if ranks.is_first:
            for name in storage.remove_leftovers(RunPaths(run).checkpoints):
                log.info("removed %s, left by a save that was cut off", name)
        # Nobody begins a save among folders that are being removed, and all ranks write into the same.
        self._attempt: str = ranks.broadcast_object(new_attempt() if ranks.is_first else None)

    @property
    def in_flight(self) -> bool:
        """The same on all ranks."""
        return self._flight is not None

    @property
    def written(self) -> bool:
        """This rank has nothing left to write, so that nobody would wait for it in :meth:`finish`."""
        return self._write is None or self._write.done

    @property
    def taken_over(self) -> TakenOverError | None:
        """What this rank knows against writing on. Only rank 0 knows; the others are told."""
        if not self._ranks.is_first or self._is_writer():
            return None
        return TakenOverError(
            f"{self._run}: another process has taken over this run; nothing more is written"
        )

    def save(self, engine: Any, step: int, facts: dict[str, Any], *, wait: bool) -> None:
        """Take the state of ``step`` and write it, in a thread while training goes on unless ``wait`` or the
        configuration says otherwise. It counts once :meth:`finish` has committed it. Collective.

        A save that fails leaves the older ones. Raises TrainingError after ``checkpoint.max_failures`` in
        a row.
        """
        self.finish()  # one at a time: a second copy of the state would not fit, and commits keep their order
        self.stop_unless_writer()
        parent, background = RunPaths(self._run).checkpoints, self._section.asynchronous and not wait
        flight = _Flight(
            step,
            facts,
            parent / partial_name(step_name(step), self._attempt),
            parent / step_name(step),
            asynchronous=background,
        )
        started = time.monotonic()
        shards: list[Shards] = []
        needed = int(self.totals.bytes * SPACE_MARGIN)
        # Each part of a save ends with all ranks agreeing that it worked. That is also the barrier that
        # closes a race: nobody writes into a folder that is still being cleared,
        problem = self._agree(
            self._on_first(lambda: self._storage.begin(flight.partial, flight.final, needed))
        ) or self._agree(
            # and nobody starts a writer for a save that another rank has given up.
            lambda: shards.append(
                self._storage.snapshot_rank(engine, flight.partial, self._ranks.rank, copies=background)
            )
        )
        flight.held_seconds = flight.snapshot_seconds = time.monotonic() - started
        if problem is not None:
            self._fail(flight, problem)
            return
        self._flight = flight
        self._write = BackgroundWrite(lambda: self._write_and_seal(flight.partial, shards.pop()))
        if not background:
            self.finish()

    def poll(self, written: bool) -> None:
        """Commit the save in flight, if there is one and its files are ``written`` on all ranks (which all
        ranks must agree on). Does not wait for the writers. Collective."""
        if self.in_flight and written:
            self.finish()

    def finish(self) -> None:
        """Wait for the save in flight, if there is one, and commit it. Collective."""
        flight, write = self._flight, self._write
        if flight is None or write is None:
            return
        self._flight = self._write = None
        started = time.monotonic()
        sealed, own_problem = write.result()
        # Nobody lists or publishes a folder that others still write into.
        answers = self._ranks.gather_objects((sealed, own_problem, write.seconds))
        problem = next(
            (f"rank {rank}: {found}" for rank, (_, found, _) in enumerate(answers) if found is not None), None
        )
        files = {name: entry for part, _, _ in answers for name, entry in part.items()}
        write_seconds = max(seconds for _, _, seconds in answers)
        self.stop_unless_writer()
        if problem is None:
            held = flight.held_seconds + time.monotonic() - started
            timing = {
                "asynchronous": flight.asynchronous,
                "held_seconds": held,
                "save_seconds": flight.snapshot_seconds + write_seconds,
            }
            # Nobody goes on, or exits, before the checkpoint counts.
            problem = self._agree(self._on_first(lambda: self._commit(flight, timing, files)))
        if problem is not None:
            self._fail(flight, problem)
            return
        self._failures = 0
        self.newest = flight.step
        self._verified.add(flight.step)
        self._remove_expired()
        held = flight.held_seconds + time.monotonic() - started
        size = sum(entry["bytes"] for entry in files.values())
        before = self.totals
        self.totals = replace(
            before,
            committed=before.committed + 1,
            held_seconds=before.held_seconds + held,
            write_seconds=before.write_seconds + write_seconds,
            bytes=size,
        )
        log.info(
            "saved %s: %.1f MB, written in %.2f s, training held for %.2f s",
            step_name(flight.step),
            size / 1e6,
            write_seconds,
            held,
        )

    def close(self) -> None:
        """End without a commit. Not collective: ranks may come here for reasons of their own."""
        if self._write is not None:
            self._write.wait(CLOSE_SECONDS)  # an interpreter that ends below a running writer may crash

    def _write_and_seal(self, partial: Path, shards: Shards) -> Sealed:
        """In the writer's thread."""
        return self._storage.seal_rank(partial, self._storage.write_files(shards))

    def _commit(self, flight: _Flight, timing: dict[str, Any], files: Sealed) -> None:
        self._sync_rows()
        manifest = {
            "step": flight.step,
            "world_size": self._ranks.world_size,
            **flight.facts,
            TIMING: timing,
            "files": dict(sorted(files.items())),
        }
        self._storage.write_manifest(flight.partial, manifest)
        self._storage.publish(flight.partial, flight.final)
        self._storage.mark(flight.final)
        try:
            self._storage.write_latest(flight.final)
        except OSError as error:  # it counts all the same
            log.warning("%s: %s", self._run, error)

    def _fail(self, flight: _Flight, problem: str) -> None:
        """Collective; ``problem`` is the same on all ranks."""
        self._agree(self._on_first(lambda: self._discard(flight)))
        self._failures += 1
        self.totals = replace(self.totals, failed=self.totals.failed + 1)
        log.warning("checkpoint of step %d failed: %s", flight.step, problem)
        if self._failures >= self._section.max_failures:
            raise TrainingError(
                f"{self._failures} checkpoints in a row could not be written, the last one at step "
                f"{flight.step}: {problem}; the older ones are kept (checkpoint.max_failures)"
            )

    def _discard(self, flight: _Flight) -> None:
        self._storage.remove(flight.partial)
        if not (flight.final / MARKER).exists():
            self._storage.remove(flight.final)

    def stop_unless_writer(self) -> None:
        """Another job may have taken this one for dead. Whatever lies in the folder is then the other's.
        Collective."""
        found = self.taken_over
        if self._ranks.broadcast_object(found is not None):
            self._ranks.raise_together(found)

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
                self._storage.remove(RunPaths(self._run).checkpoints / universal_name(step))
                self._storage.remove(RunPaths(self._run).checkpoints / step_name(step))
            except OSError as error:
                log.warning("step-%d could not be removed: %s", step, error)


def _bytes_of(run: Path, step: int | None) -> int:
    """Of the checkpoint that was resumed from, so that the first save knows what room it needs."""
    if step is None:
        return 0
    files = read_manifest(RunPaths(run).checkpoints / step_name(step))["files"]
    return sum(int(entry["bytes"]) for entry in files.values())
