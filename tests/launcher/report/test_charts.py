"""Points land where they belong, on any values."""

from __future__ import annotations

import pytest

from launcher.report.charts import PANEL_HEIGHT, PANEL_WIDTH, intervals, panel
from launcher.report.numbers import percent, short, signed


def test_a_line_goes_from_corner_to_corner() -> None:
    chart = panel("x", [(0, "a", [(1.0, 0.0), (2.0, 5.0), (3.0, 10.0)])])
    assert (
        chart.lines[0].path == f"M0.0 {PANEL_HEIGHT}L{PANEL_WIDTH / 2} {PANEL_HEIGHT / 2}L{PANEL_WIDTH} 0.0"
    )
    assert (chart.lines[0].band, chart.lines[0].last) == ("", "10")
    assert [(tick.at, tick.text) for tick in chart.rows] == [(130.0, "0"), (65.0, "5"), (0.0, "10")]


def test_all_runs_share_the_axes() -> None:
    chart = panel("x", [(0, "a", [(0.0, 0.0), (10.0, 1.0)]), (2, "b", [(0.0, 0.0), (20.0, 2.0)])])
    assert [line.series for line in chart.lines] == [0, 2]
    assert chart.lines[0].path == f"M0.0 130.0L{PANEL_WIDTH / 2} 65.0"
    assert chart.lines[1].path == f"M0.0 130.0L{PANEL_WIDTH} 0.0"


def test_a_logarithmic_axis_has_decades_and_leaves_out_what_is_not_above_zero() -> None:
    chart = panel("x", [(0, "a", [(0.0, 100.0), (1.0, 0.0), (2.0, 1.0), (3.0, 0.01)])], logarithmic=True)
    assert chart.lines[0].path == "M0.0 0.0L200.0 65.0L300.0 130.0"
    assert [tick.text for tick in chart.rows] == ["0.01", "1", "100"]
    assert chart.logarithmic
    assert not panel("x", [(0, "a", [(0.0, 0.0), (1.0, -1.0)])], logarithmic=True).logarithmic


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-300, 1e300])
def test_a_constant_is_drawn(value: float, logarithmic: bool) -> None:
    chart = panel("x", [(0, "a", [(1.0, value), (2.0, value)])], logarithmic=logarithmic)
    assert "nan" not in chart.lines[0].path
    assert len(chart.rows) >= 1


def test_a_single_point_can_be_seen() -> None:
    assert panel("x", [(0, "a", [(5.0, 1.0)])]).lines[0].path.count("L") == 1


def test_a_chart_without_points_has_no_line() -> None:
    assert panel("x", [(0, "a", [])], logarithmic=True).lines == ()


def test_noise_has_a_band_around_the_line() -> None:
    chart = panel("x", [(0, "a", [(float(step), float(step % 2)) for step in range(1000)])])
    assert chart.lines[0].band.endswith("Z")


def test_intervals_share_an_axis_and_may_show_zero() -> None:
    chart = intervals(
        [(0, "a", "", 5.0, 4.0, 6.0, "5"), (None, "b", "note", 10.0, 10.0, 10.0, "10")], with_zero=True
    )
    first, second = chart.rows
    assert 0 < chart.zero < first.low < first.at < first.high < second.at < 100
    assert first.at - first.low == pytest.approx(first.high - first.at, abs=0.2)
    assert intervals([(0, "a", "", 5.0, 4.0, 6.0, "5")], with_zero=False).zero is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.09791, "0.0979"),
        (15.52, "15.5"),
        (1087.0, "1087"),
        (12345.0, "12.3k"),
        (2.5e9, "2.5G"),
        (4.5e-5, "4.5e\N{MINUS SIGN}5"),
        (-3.0, "\N{MINUS SIGN}3"),
        (0.0, "0"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_shares_and_differences_keep_what_is_small() -> None:
    assert [percent(share) for share in (0.0, 1.0, 0.974, 0.0042, 1e-6)] == [
        "0 %",
        "100 %",
        "97 %",
        "0.42 %",
        "< 0.01 %",
    ]
    assert (signed(1.25), signed(-4.1)) == ("+1.2", "\N{MINUS SIGN}4.1")
