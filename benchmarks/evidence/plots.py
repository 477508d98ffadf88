"""The pictures of docs/evidence.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

from benchmarks.evidence.conditions import BASELINE
from benchmarks.evidence.curves import Groups, accuracy_of
from benchmarks.evidence.statistics import paired_difference

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "alignkd"  # the same records make the same file
from matplotlib import pyplot  # noqa: E402 - the back end is chosen first
from matplotlib.figure import Figure  # noqa: E402


def plot_differences(groups: Groups, path: Path) -> None:
    """The paired difference of every condition, and its interval."""
    base = groups[BASELINE]
    pairs = [(name, paired_difference(runs, base)) for name, runs in groups.items() if name != BASELINE]
    shown = [(name, paired) for name, paired in pairs if paired is not None]
    figure, axis = pyplot.subplots(figsize=(7, 1.2 + 0.3 * len(shown)), layout="constrained")
    for height, (_, paired) in enumerate(shown):
        axis.plot([100 * paired.low, 100 * paired.high], [height, height], color="#0072B2", linewidth=2)
        axis.plot(100 * paired.value, height, "o", color="#0072B2")
    axis.axvline(0.0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(shown)), [f"{name} ({paired.seeds})" for name, paired in shown], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(
        "test accuracy minus that of the student alone, points; 95 % interval (pairs)", fontsize=8
    )
    axis.spines[["top", "right", "left"]].set_visible(False)
    _save(figure, path)


def plot_curves(groups: Groups, kind: str, names: Sequence[str], path: Path) -> None:
    """A line for each condition: the mean over its seeds at each validation."""
    figure, axis = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    for name in (name for name in names if name in groups):
        looks = list(zip(*(record["validation"] for record in groups[name]), strict=True))
        accuracies = [100 * statistics.fmean(accuracy_of(look, kind) for look in of) for of in looks]
        axis.plot([of[0]["step"] for of in looks], accuracies, marker="o", markersize=3, label=name)
    axis.set_xlabel("optimizer steps", fontsize=8)
    axis.set_ylabel("right answers on validation, %", fontsize=8)
    axis.set_ylim(0, 102)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
