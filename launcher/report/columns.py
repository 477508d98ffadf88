"""The rows of ``metrics.jsonl`` as columns, whichever a run has."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from alignkd.run_folder.metrics import Row

AVERAGED_STEPS = 10  # the loss of a single step is too noisy to compare
BINS = 240  # points of a curve: more than a panel has pixels for

Point = tuple[float, float]  # step, value


@dataclass(frozen=True)
class Columns:
    """Column name -> (step, value) of the rows that have a number there, in the order of the steps."""

    rows: int
    points: dict[str, list[Point]]

    @property
    def last_step(self) -> int:
        return int(max((points[-1][0] for points in self.points.values() if points), default=0))

    def values(self, name: str) -> list[float]:
        return [value for _, value in self.points.get(name, [])]

    def first_and_last(self, name: str) -> tuple[float, float] | None:
        """Means over the first and the last steps; None for a column without numbers."""
        values = self.values(name)
        if not values:
            return None
        return statistics.fmean(values[:AVERAGED_STEPS]), statistics.fmean(values[-AVERAGED_STEPS:])


def read_columns(rows: Iterable[Row]) -> Columns:
    """Rows without a step, and values that are not finite numbers, are left out."""
    points: dict[str, list[Point]] = {}
    count = 0
    for row in rows:
        step = row.get("step")
        if not _is_number(step):
            continue
        count += 1
        for name, value in row.items():
            if name != "step" and _is_number(value):
                points.setdefault(name, []).append((float(step), float(value)))
    return Columns(count, points)


@dataclass(frozen=True)
class Bin:
    step: float
    mean: float
    low: float
    high: float


def binned(points: Sequence[Point], bins: int = BINS) -> list[Bin]:
    """Neighbouring points together, so that a long run is drawn in as many points as a short one."""
    size = max(1, math.ceil(len(points) / bins))
    found = []
    for start in range(0, len(points), size):
        steps, values = zip(*points[start : start + size], strict=True)
        mean = min(max(statistics.fmean(values), min(values)), max(values))
        found.append(Bin(statistics.fmean(steps), mean, min(values), max(values)))
    return found


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
