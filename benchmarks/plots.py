"""Pictures of the results, for docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from benchmarks.results import Result, time_ratio

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "alignkd"  # the same results make the same file
from matplotlib import pyplot  # noqa: E402 - the back end is chosen first
from matplotlib.patches import Patch  # noqa: E402

# Okabe and Ito's palette, which colour-blind readers can tell apart; the labels say it all, too.
COLOURS = {"ours": "#0072B2", "ours, one switch changed": "#56B4E9", "stand-in": "#D55E00"}
ROW, GAP = 1.0, 0.9  # heights, of a bar and between shapes


def plot_steps(results: Sequence[Result], path: Path) -> None:
    """Time, and tensors kept for backward, of each method over the floor's: a bar each, grouped by shape."""
    results = [result for result in results if not result.out_of_time]
    floors = {result.shape: result for result in results if result.method == "floor"}
    shown = [result for result in results if result.method != "floor" and result.shape in floors]
    heights, names, shapes = _places(shown)
    figure, (time_axis, kept_axis) = pyplot.subplots(
        1, 2, figsize=(10, 1.6 + 0.21 * heights[-1]), sharey=True, layout="constrained"
    )
    for axis, title in ((time_axis, "time / floor"), (kept_axis, "kept for backward / floor, log scale")):
        axis.set_title(title, fontsize=10)
        axis.axvline(1.0, color="black", linewidth=0.8, zorder=3)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    kept_axis.set_xscale("log")
    for result, height in zip(shown, heights, strict=True):
        floor = floors[result.shape]
        for axis, ratio in (
            (time_axis, _time(result, floor)),
            (kept_axis, _kept(result, floor)),
        ):
            if ratio is None:
                axis.text(1.0, height, " does not fit", fontsize=8, va="center", style="italic")
                continue
            # From the floor's line on: what is left of it is below the floor.
            axis.barh(height, ratio - 1.0, 0.8, left=1.0, color=COLOURS[_kind(result.method)])
            axis.text(max(ratio, 1.0), height, f" {ratio:.2f}", fontsize=8, va="center")
    time_axis.set_yticks(heights, names, fontsize=8)
    for name, height in shapes:
        time_axis.text(
            -0.01, height, name, fontsize=9, weight="bold", ha="right", va="center",
            transform=time_axis.get_yaxis_transform(),
        )  # fmt: skip
    time_axis.set_ylim(heights[-1] + 1, -1.6)
    for axis in (time_axis, kept_axis):
        low, high = axis.get_xlim()
        axis.set_xlim(low, high * 1.35 if axis is kept_axis else high + 0.12 * (high - low))
    kept_axis.xaxis.set_major_locator(matplotlib.ticker.FixedLocator([0.25, 0.5, 1, 2, 5, 10, 20, 50, 100]))
    kept_axis.xaxis.set_major_formatter("{x:g}")
    kept_axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    figure.suptitle("One distillation step over its floor: further left is better", fontsize=12)
    handles = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _places(shown: Sequence[Result]) -> tuple[list[float], list[str], list[tuple[str, float]]]:
    """Height and name of every bar, name and height of every shape's heading; downwards."""
    heights: list[float] = []
    headings: list[tuple[str, float]] = []
    height = -GAP - ROW
    for number, result in enumerate(shown):
        if not number or result.shape != shown[number - 1].shape:
            height += GAP
            headings.append((result.shape, height + 0.1))
            height += ROW
        heights.append(height)
        height += ROW
    return heights, [result.method for result in shown], headings


def _kind(method: str) -> str:
    return method if method in COLOURS else "ours, one switch changed"


def _time(result: Result, floor: Result) -> float | None:
    return time_ratio(result, floor) if result.fits and floor.fits else None


def _kept(result: Result, floor: Result) -> float | None:
    if not result.fits or result.memory is None or floor.memory is None:
        return None
    return result.memory.kept / floor.memory.kept
