"""Numbers and lists in messages."""

from __future__ import annotations

from alignkd.text import counted, duration, listed


def test_counts_have_the_right_plural() -> None:
    shown = [counted(1, "rank"), counted(0, "rank"), counted(2, "micro-batch"), counted(1, "micro-batch")]
    assert shown == ["1 rank", "0 ranks", "2 micro-batches", "1 micro-batch"]


def test_lists_are_separated_by_commas() -> None:
    assert listed([1, 2, 4]) == "1, 2, 4"
    assert listed([]) == ""


def test_durations_are_minutes_and_seconds_or_hours() -> None:
    assert [duration(seconds) for seconds in (0, 59.6, 3845)] == ["0:00", "1:00", "1:04:05"]
