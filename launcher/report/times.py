"""Where the wall time of a run's attempts went."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignkd.run_folder.metrics import Row
from launcher.run.attempts import Attempt


@dataclass(frozen=True)
class TimeParts:
    """Seconds. ``wall`` is the time of all attempts; the parts add up to it."""

    wall: float
    parts: dict[str, float]

    def share(self, name: str) -> float:
        return self.parts[name] / self.wall


def time_parts(
    rows: Iterable[Row], attempts: Sequence[Attempt], last_sign: float | None, result: Mapping[str, Any]
) -> TimeParts | None:
    """``last_sign``: Unix time to which an open attempt has come. ``result``: ``result.json``. It knows what
    saves cost in the last process only, so that saves are not shown apart where there were several attempts.
    None for a run that took no time yet."""
    ends = [(attempt, attempt.end if attempt.end is not None else last_sign) for attempt in attempts]
    wall = sum(max(0.0, end - attempt.start) for attempt, end in ends if end is not None)
    steps = teacher = data = 0.0
    for row in rows:
        seconds = _number(row.get("step_seconds"))
        steps += seconds
        teacher += seconds * _number(row.get("teacher_seconds_share"))
        data += seconds * _number(row.get("data_wait_share"))
    wall = max(wall, steps)
    if wall <= 0:
        return None
    saves = result.get("saves")
    held = _number(saves.get("held_seconds")) if isinstance(saves, Mapping) and len(attempts) == 1 else 0.0
    held = min(held, wall - steps)
    parts = {
        "student": max(0.0, steps - teacher - data),
        "teacher": teacher,
        "waiting for data": data,
        "saves": held,
        "start, export, lost steps": wall - steps - held,
    }
    return TimeParts(wall, parts)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0
