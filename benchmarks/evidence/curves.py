"""When a kind of question is learnt: its validation accuracy over the training."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import pyplot

from benchmarks.evidence.conditions import BASELINE
from benchmarks.evidence.statistics import Record

LEARNT = 0.9
Groups = Mapping[str, Sequence[Record]]


def mean_over_training(record: Record, kind: str) -> float:
    """Of the validations of a run, which are at equal distances: the earlier it is learnt, the higher."""
    return statistics.fmean(look["accuracy"][kind] for look in record["validation"])


def steps_to_learn(record: Record, kind: str) -> int | None:
    """The first validation with 90 % right answers; None if there is none."""
    return next((look["step"] for look in record["validation"] if look["accuracy"][kind] >= LEARNT), None)


def rows_of(groups: Groups, kind: str) -> list[list[str]]:
    """Of each condition with as many steps as the baseline: its name, the mean over the training, the
    difference to the baseline of the same seed (mean ± standard error over the pairs), and the median of the
    steps to learn the kind. What was not learnt counts as later than all others."""
    base = {record["seed"]: record for record in groups[BASELINE]}
    steps = {record["steps"] for record in base.values()}
    rows = []
    for name, records in groups.items():
        if {record["steps"] for record in records} != steps:
            continue
        means = [mean_over_training(record, kind) for record in records]
        pairs = [
            mean - mean_over_training(base[record["seed"]], kind)
            for record, mean in zip(records, means, strict=True)
            if record["seed"] in base
        ]
        learnt = sorted(steps_to_learn(record, kind) or float("inf") for record in records)
        rows.append(
            [
                name,
                f"{100 * statistics.fmean(means):.1f}",
                "" if name == BASELINE else _with_error(pairs),
                _median(learnt),
            ]
        )
    return rows


def plot_curves(groups: Groups, kind: str, names: Sequence[str], path: Path) -> None:
    """A line for each condition: the mean over its seeds at each validation."""
    figure, axis = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    for name in (name for name in names if name in groups):
        looks = list(zip(*(record["validation"] for record in groups[name]), strict=True))
        accuracies = [100 * statistics.fmean(look["accuracy"][kind] for look in of) for of in looks]
        axis.plot([of[0]["step"] for of in looks], accuracies, marker="o", markersize=3, label=name)
    axis.set_xlabel("optimizer steps", fontsize=8)
    axis.set_ylabel("right answers on validation, %", fontsize=8)
    axis.set_ylim(0, 102)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _with_error(pairs: Sequence[float]) -> str:
    if not pairs:
        return ""
    error = f" ± {100 * statistics.stdev(pairs) / len(pairs) ** 0.5:.1f}" if len(pairs) > 1 else ""
    return f"{100 * statistics.fmean(pairs):+.1f}{error}"


def _median(steps: Sequence[float]) -> str:
    """The upper one of two, so that it is a number of steps."""
    middle = steps[len(steps) // 2]
    return "not learnt" if middle == float("inf") else f"{middle:.0f}"
