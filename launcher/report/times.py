"""Where the wall time of a run's attempts went."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignkd.run_folder.metrics import Row
from launcher.run.attempts import Attempt

# Column of a metrics row that is a share of the step's time -> what it is spent on.
_SHARES = {
    "student_seconds_share": "student",
    "teacher_seconds_share": "teacher",
    "optimizer_seconds_share": "optimizer",
    "data_wait_share": "waiting for data",
}
_REST = "rest of the steps"
_SAVES = "saves"
_OTHER = "start, export, lost steps"
NAMES = (*_SHARES.values(), _REST, _SAVES, _OTHER)  # each has its own colour, in this order


@dataclass(frozen=True)
class TimeParts:
    """Seconds. ``wall`` is the time of all attempts; the parts add up to it. Parts that took no time, or that
    an older version did not measure, are left out."""

    wall: float
    parts: dict[str, float]

    def share(self, name: str) -> float:
        return self.parts[name] / self.wall

    def color(self, name: str) -> int:
        return NAMES.index(name)


def time_parts(
    rows: Iterable[Row], attempts: Sequence[Attempt], last_sign: float | None, result: Mapping[str, Any]
) -> TimeParts | None:
    """``last_sign``: Unix time to which an open attempt has come. ``result``: ``result.json``. It knows what
    saves cost in the last process only, so that saves are not shown apart where there were several attempts.
    None for a run that took no time yet."""
    ends = [(attempt, attempt.end if attempt.end is not None else last_sign) for attempt in attempts]
    wall = sum(max(0.0, end - attempt.start) for attempt, end in ends if end is not None)
    steps, measured = 0.0, dict.fromkeys(_SHARES.values(), 0.0)
    for row in rows:
        seconds = _number(row.get("step_seconds"))
        steps += seconds
        for column, name in _SHARES.items():
            measured[name] += seconds * _number(row.get(column))
    wall = max(wall, steps)
    if wall <= 0:
        return None
    saves = result.get("saves")
    held = _number(saves.get("held_seconds")) if isinstance(saves, Mapping) and len(attempts) == 1 else 0.0
    held = min(held, wall - steps)
    rest = max(0.0, steps - sum(measured.values()))
    parts = {**measured, _REST: rest, _SAVES: held, _OTHER: wall - steps - held}
    return TimeParts(wall, {name: seconds for name, seconds in parts.items() if seconds > 0})


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0
