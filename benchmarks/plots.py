"""Pictures of the results, for docs/performance.md."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "alignkd"  # the same results make the same file
from matplotlib import pyplot  # noqa: E402 - the back end is chosen first


def plot_steps(results: list[dict[str, Any]], path: Path) -> None:
    """Time, and tensors kept for backward, of each method over the floor's, by shape."""
    shapes = list(dict.fromkeys(result["shape"] for result in results))
    methods = list(dict.fromkeys(result["method"] for result in results))
    by_key = {(result["shape"], result["method"]): result for result in results}
    figure, axes = pyplot.subplots(2, 1, figsize=(9, 7), sharex=True)
    width = 0.8 / len(methods)
    for axis, (title, value) in zip(axes, (("time", _time), ("kept for backward", _kept)), strict=True):
        for number, method in enumerate(methods):
            heights = []
            for shape in shapes:
                result, floor = by_key.get((shape, method)), by_key[shape, "floor"]
                fits = result is not None and result["fits"] and floor["fits"]
                heights.append(value(result, floor) if result is not None and fits else float("nan"))
            places = [position + (number - (len(methods) - 1) / 2) * width for position in range(len(shapes))]
            bars = axis.bar(places, heights, width, label=method)
            axis.bar_label(bars, fmt="%.2f", fontsize=6, rotation=90, padding=2)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_ylabel(f"{title}, x floor")
        axis.margins(y=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xticks(range(len(shapes)), shapes)
    axes[-1].set_xlabel("length x samples")
    axes[0].legend(fontsize=8, ncols=4, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _time(result: dict[str, Any], floor: dict[str, Any]) -> float:
    ratios = [a / b for a, b in zip(result["seconds"], floor["seconds"], strict=True)]
    return float(statistics.median(ratios))


def _kept(result: dict[str, Any], floor: dict[str, Any]) -> float:
    return float(result["memory"]["kept"] / floor["memory"]["kept"])
