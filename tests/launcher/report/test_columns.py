"""Rows as columns, and curves of few points."""

from __future__ import annotations

import pytest

from launcher.report.columns import AVERAGED_STEPS, BINS, binned, read_columns


def test_a_column_has_the_steps_at_which_it_is_a_finite_number() -> None:
    columns = read_columns(
        [
            {"step": 1, "loss": 2.0, "name": "x", "flag": True},
            {"step": 2, "loss": None},
            {"step": 3, "loss": float("nan")},
            {"step": 4, "loss": 1, "extra": 5.0},
            {"loss": 9.0},
            {"step": "5", "loss": 9.0},
        ]
    )
    assert columns.rows == 4
    assert columns.points == {"loss": [(1.0, 2.0), (4.0, 1.0)], "extra": [(4.0, 5.0)]}
    assert columns.last_step == 4


def test_the_first_and_last_value_are_means_over_some_steps() -> None:
    columns = read_columns({"step": step, "loss": float(step)} for step in range(1, 101))
    half = (AVERAGED_STEPS - 1) / 2
    assert columns.first_and_last("loss") == (1 + half, 100 - half)
    assert columns.first_and_last("other") is None


def test_a_run_without_rows_has_no_columns() -> None:
    columns = read_columns([])
    assert (columns.rows, columns.last_step, columns.points) == (0, 0, {})


def test_bins_cover_every_point_and_keep_the_extremes() -> None:
    points = [(float(step), float(step % 7)) for step in range(1, 5001)]
    bins = binned(points)
    assert len(bins) <= BINS
    assert (min(one.low for one in bins), max(one.high for one in bins)) == (0.0, 6.0)
    assert all(one.low <= one.mean <= one.high for one in bins)
    assert sum(one.mean for one in bins) / len(bins) == pytest.approx(3, abs=0.05)
    assert [one.step for one in binned(points[:3])] == [1.0, 2.0, 3.0]
    assert binned([]) == []


def test_the_mean_of_equal_values_is_not_outside_of_them() -> None:
    (one,) = binned([(float(step), 0.1) for step in range(3)], bins=1)
    assert one.low == one.mean == one.high == 0.1
