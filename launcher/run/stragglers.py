"""Ranks that are slower than the others, by what each says of itself in its heartbeat."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from alignkd.run_folder.heartbeat import read_beat

NOTABLE = 1.2  # times the median
_LEAST_SHARE = 0.05  # of a step: less is noise


@dataclass(frozen=True)
class Straggler:
    """``times``: what the rank does alone in a step takes it so many times as long as the median rank."""

    rank: int
    times: float


def find_stragglers(run: Path, world_size: int) -> list[Straggler]:
    """The slowest first. Empty while the ranks have not made steps."""
    own, steps = {}, []
    for rank in range(world_size):
        beat = read_beat(run, rank)
        if beat is not None and beat.own_seconds is not None and beat.step_seconds is not None:
            own[rank] = beat.own_seconds
            steps.append(beat.step_seconds)
    return stragglers(own, statistics.median(steps)) if steps else []


def stragglers(own_seconds: Mapping[int, float], step_seconds: float) -> list[Straggler]:
    """``own_seconds``: of a step, by rank, without waiting for others."""
    if len(own_seconds) < 2:
        return []
    # The lower median: of two ranks, the faster one.
    usual = statistics.median_low(own_seconds.values())
    found = [
        Straggler(rank, round(seconds / max(usual, 1e-9), 2))
        for rank, seconds in own_seconds.items()
        if seconds > NOTABLE * usual and seconds - usual > _LEAST_SHARE * step_seconds
    ]
    return sorted(found, key=lambda straggler: -straggler.times)
