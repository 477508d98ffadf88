"""Shapes of charts in SVG units. ``macros.html.j2`` draws them, and escapes every text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launcher.report.columns import Bin, Point, binned
from launcher.report.numbers import short

PANEL_WIDTH, PANEL_HEIGHT = 300.0, 130.0
_TICKS = 4
_DECADES = 30.0  # a logarithmic axis over more would say nothing


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Line:
    series: int  # number of its colour
    name: str
    path: str
    band: str  # from the lowest to the highest value around each point; empty where that is the line
    last: str


@dataclass(frozen=True)
class Panel:
    """One column over the steps, a line per run."""

    title: str
    logarithmic: bool
    lines: tuple[Line, ...]
    rows: tuple[Tick, ...]  # of the y axis
    steps: tuple[Tick, ...]  # of the x axis


def panel(
    title: str, series: Sequence[tuple[int, str, Sequence[Point]]], *, logarithmic: bool = False
) -> Panel:
    """``series``: number of the colour, name and points of each run that has the column.

    A logarithmic axis leaves out what is not above 0, and is a linear one where nothing is.
    """
    drawn = [
        (number, name, binned(_positive(points) if logarithmic else points))
        for number, name, points in series
    ]
    if logarithmic and not any(bins for _, _, bins in drawn):
        return panel(title, series)
    drawn = [(number, name, bins) for number, name, bins in drawn if bins]
    values = [value for _, _, bins in drawn for one in bins for value in (one.low, one.high)]
    vertical = _Axis.of(values, PANEL_HEIGHT, 0.0, logarithmic=logarithmic)
    horizontal = _Axis.of([step for _, _, points in series for step, _ in points], 0.0, PANEL_WIDTH)
    lines = tuple(
        Line(
            number,
            name,
            _path(bins, horizontal, vertical),
            _band(bins, horizontal, vertical),
            short(bins[-1].mean),
        )
        for number, name, bins in drawn
    )
    return Panel(title, logarithmic, lines, vertical.ticks(), horizontal.ticks())


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval, in SVG units and in words."""

    series: int | None  # None: a grey mark
    name: str
    note: str
    at: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Intervals:
    rows: tuple[Interval, ...]
    ticks: tuple[Tick, ...]
    zero: float | None  # where 0 is, if it is in sight
    width: float = 100.0  # per cent


def intervals(
    rows: Iterable[tuple[int | None, str, str, float, float, float, str]], *, with_zero: bool
) -> Intervals:
    """``rows``: colour, name, note, value, low, high and text of each."""
    found = list(rows)
    ends = [end for _, _, _, value, low, high, _ in found for end in (value, low, high)]
    axis = _Axis.of([*ends, 0.0] if with_zero else ends, 0.0, Intervals.width, padding=0.06)
    drawn = tuple(
        Interval(series, name, note, axis(value), axis(low), axis(high), text)
        for series, name, note, value, low, high, text in found
    )
    return Intervals(drawn, axis.ticks(), axis(0.0) if with_zero else None)


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float  # in SVG units, of `low`
    end: float
    logarithmic: bool

    @classmethod
    def of(
        cls,
        values: Sequence[float],
        start: float,
        end: float,
        *,
        logarithmic: bool = False,
        padding: float = 0.0,
    ) -> _Axis:
        low, high = min(values, default=0.0), max(values, default=1.0)
        if logarithmic:
            return cls(max(low, high / 10**_DECADES), high if high > low else high * 10, start, end, True)
        if low == high:
            low, high = (0.0, 1.0) if low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
        width = high - low
        return cls(low - padding * width, high + padding * width, start, end, False)

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log10(max(value, low)), math.log10(low), math.log10(high)
        return round(self.start + (self.end - self.start) * (value - low) / (high - low), 1)

    def ticks(self) -> tuple[Tick, ...]:
        return tuple(Tick(self(value), short(value)) for value in self._tick_values())

    def _tick_values(self) -> list[float]:
        if self.logarithmic:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            every = max(1, math.ceil((last - first + 1) / _TICKS))
            decades = [10.0**exponent for exponent in range(first, last + 1, every)]
            return decades if len(decades) > 1 else [self.low, self.high]
        rough = (self.high - self.low) / _TICKS
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
        first = math.ceil(self.low / step)
        return [number * step for number in range(first, math.floor(self.high / step) + 1)]


def _positive(points: Sequence[Point]) -> list[Point]:
    return [(step, value) for step, value in points if value > 0]


def _path(bins: Sequence[Bin], horizontal: _Axis, vertical: _Axis) -> str:
    points = [(horizontal(one.step), vertical(one.mean)) for one in bins]
    if len(points) == 1:  # a line of one point would not be seen
        ((x, y),) = points
        return f"M{x - 2} {y}L{x + 2} {y}"
    return "M" + "L".join(f"{x} {y}" for x, y in points)


def _band(bins: Sequence[Bin], horizontal: _Axis, vertical: _Axis) -> str:
    if all(one.low == one.high for one in bins):
        return ""
    above = [f"{horizontal(one.step)} {vertical(one.high)}" for one in bins]
    below = [f"{horizontal(one.step)} {vertical(one.low)}" for one in reversed(bins)]
    return "M" + "L".join([*above, *below]) + "Z"
