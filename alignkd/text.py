"""Numbers and lists as messages write them."""

from __future__ import annotations

from collections.abc import Iterable


def counted(number: int, word: str) -> str:
    """`1 rank`, `2 ranks`, `3 batches`."""
    plural = word + ("es" if word.endswith(("ch", "s")) else "s")
    return f"{number} {word if number == 1 else plural}"


def listed(values: Iterable[object]) -> str:
    """`1, 2, 4`."""
    return ", ".join(str(value) for value in values)


def duration(seconds: float) -> str:
    """`4:05` or `1:04:05`."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
