"""Finds ranks that hang, by the beats of all ranks (``alignkd.run_folder.heartbeat``). Reads files only.

When one rank hangs none moves, since every step has collectives. So a hang is the silence of all, and who is
behind follows from where each rank has stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from alignkd.errors import EXIT_HUNG
from alignkd.run_folder.atomic_files import read_json, write_json
from alignkd.run_folder.heartbeat import PHASES, STEP_PHASES, Beat, beat_seconds, read_beat
from alignkd.run_folder.paths import RunPaths
from alignkd.text import counted

SLOWEST_STEPS = 10  # a step may take so many times the median
# Outside steps (a save, a conversion, the first two steps) nothing tells long work from a hang.
LONG_PHASES = 12  # times hang_seconds


@dataclass(frozen=True)
class Hang:
    """``ranks`` are behind the others, on ``nodes``; both are empty when all wait at the same place."""

    ranks: tuple[int, ...]
    nodes: tuple[str, ...]
    message: str


def write_hang(run: Path, hang: Hang) -> None:
    write_json(RunPaths(run).hang, asdict(hang))


def read_hang(run: Path) -> Hang | None:
    """Why this attempt was ended; None when it did not hang."""
    values = read_json(RunPaths(run).hang)
    if values is None:
        return None
    return Hang(tuple(values["ranks"]), tuple(values["nodes"]), values["message"])


def hang_codes(hang: Hang) -> dict[int, int]:
    """The exit codes to record for the attempt: those of the killed ranks would not say which one hung."""
    return {hang.ranks[0] if hang.ranks else 0: EXIT_HUNG}


@dataclass
class _Seen:
    """Of one rank, by the clock of the watch."""

    beat: Beat | None
    beat_at: float
    moved_at: float


class HangWatch:
    """``nodes``: that of each rank; empty where they are not known. ``hang_seconds`` (0: it never looks) and
    ``rendezvous_seconds`` are those of the section ``training``."""

    def __init__(
        self,
        run: Path,
        world_size: int,
        nodes: Sequence[str],
        hang_seconds: float,
        rendezvous_seconds: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._nodes, self._now = run, nodes, now
        self._hang_seconds, self._rendezvous_seconds = hang_seconds, rendezvous_seconds
        self.interval = beat_seconds(hang_seconds)
        self._last_look = now()
        self._clock = 0.0  # runs only while this process does: not while the whole job is suspended
        self._seen = [_Seen(None, 0.0, 0.0) for _ in range(world_size)]

    def look(self, exited: Collection[int] = ()) -> Hang | None:
        """Read all beats, at most once per ``interval``. The processes of ranks in ``exited`` have ended."""
        passed = self._now() - self._last_look
        if passed < self.interval or not self._hang_seconds:
            return None
        self._last_look += passed
        self._clock += min(passed, 2 * self.interval)
        for rank, seen in enumerate(self._seen):
            self._read(rank, seen)
        quiet = self._clock - max(seen.moved_at for seen in self._seen)
        frozen, limit = self._judge(exited)
        return self._name(frozen, quiet, limit) if quiet > limit else None

    def _read(self, rank: int, seen: _Seen) -> None:
        beat = read_beat(self._run, rank)
        if beat is None or beat == seen.beat:
            return
        seen.beat_at = self._clock
        if seen.beat is None or beat.moves != seen.beat.moves:
            seen.moved_at = self._clock
        seen.beat = beat

    def _judge(self, exited: Collection[int]) -> tuple[list[int], float]:
        """Ranks whose process cannot run while others can, and for how long no rank may move."""
        silence = max(4 * self.interval, self._step_limit() / 2)
        silent = [
            rank
            for rank, seen in enumerate(self._seen)
            if self._clock - seen.beat_at > silence and rank not in exited
        ]
        if len(silent) == len(self._seen):
            # It is the file system, or no rank has started (an image is being pulled, say).
            return [], self._long_limit()
        # The others wait for a rank that has not started, and their own error then says more.
        met = self._clock > silence + self._rendezvous_seconds
        frozen = [rank for rank in silent if met or self._seen[rank].beat is not None]
        return frozen, self._limit(frozen)

    def _step_limit(self) -> float:
        steps = [seen.beat.step_seconds for seen in self._seen if seen.beat and seen.beat.step_seconds]
        return max([self._hang_seconds, *(SLOWEST_STEPS * seconds for seconds in steps)])

    def _limit(self, frozen: Sequence[int]) -> float:
        in_steps = all(
            seen.beat is not None
            # Known from the second step on: until then a step may take longer than any limit made of it.
            and seen.beat.step_seconds is not None
            and seen.beat.phase in STEP_PHASES
            for seen in self._seen
        )
        return self._step_limit() if frozen or in_steps else self._long_limit()

    def _long_limit(self) -> float:
        return max(LONG_PHASES * self._hang_seconds, self._step_limit())

    def _name(self, frozen: Sequence[int], quiet: float, limit: float) -> Hang:
        behind = list(frozen) or self._last_ranks()
        nodes = tuple(dict.fromkeys(self._nodes[rank] for rank in behind)) if self._nodes else ()
        parts = [f"{self._rank(rank)} is behind: {self._place(rank, frozen)}" for rank in behind[:8]]
        if len(behind) > 8:
            parts.append(f"{counted(len(behind) - 8, 'more rank')}")
        others = next((rank for rank in range(len(self._seen)) if rank not in behind), None)
        if not behind:
            parts = [f"no rank is behind, all are at {self._place(0, ())}; their stacks say where"]
        elif others is not None:
            parts.append(f"rank {others}, which waits, is at {self._place(others, ())}")
        parts.append(
            f"nothing has moved for {quiet:.0f} s (limit: {limit:.0f} s, from training.hang_seconds)"
        )
        return Hang(tuple(behind), nodes, "; ".join(parts))

    def _last_ranks(self) -> list[int]:
        """Ranks that have come less far than the furthest; empty when all are at the same place."""
        places = [_place(seen.beat) for seen in self._seen]
        return [rank for rank, place in enumerate(places) if place == min(places) < max(places)]

    def _rank(self, rank: int) -> str:
        return f"rank {rank} on {self._nodes[rank]}" if self._nodes else f"rank {rank}"

    def _place(self, rank: int, frozen: Sequence[int]) -> str:
        seen = self._seen[rank]
        if seen.beat is None:
            return "it has never started"
        phase = (
            "the first step" if seen.beat.phase in STEP_PHASES and not seen.beat.steps else seen.beat.phase
        )
        text = f"step {seen.beat.step}, {phase}"
        if rank not in frozen:
            return text
        silent = self._clock - seen.beat_at
        return f"{text}, without a heartbeat for {silent:.0f} s (its process is stopped, or its node is gone)"


def _place(beat: Beat | None) -> tuple[int, int]:
    """Larger: further in the run."""
    if beat is None:
        return -1, -1
    return beat.step, PHASES.index(beat.phase) if beat.phase in PHASES else len(PHASES)
