"""When the questions are learnt: their validation accuracy over the training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.evidence.conditions import BASELINE
from benchmarks.evidence.statistics import Record, validation_accuracy

LEARNT = 0.9
Groups = Mapping[str, Sequence[Record]]


def accuracy_of(look: Mapping[str, Any], kind: str | None) -> float:
    """Of one kind, or of all, each weighing the same."""
    return validation_accuracy(look) if kind is None else float(look["accuracy"][kind])


def mean_over_training(record: Record, kind: str | None = None) -> float:
    """Of the validations of a run, which are at equal distances: the earlier it is learnt, the higher."""
    return statistics.fmean(accuracy_of(look, kind) for look in record["validation"])


def steps_to_learn(record: Record, kind: str) -> int | None:
    """The first validation with 90 % right answers; None if there is none."""
    return next((look["step"] for look in record["validation"] if accuracy_of(look, kind) >= LEARNT), None)


def rows_of(groups: Groups, kinds: Sequence[str]) -> list[list[str]]:
    """Of each condition with as many steps as the baseline: its name, its mean over the training and the
    difference to the baseline of the same seed, for all kinds together and each of ``kinds``; for the latter
    the median of the steps to learn it, too. What was not learnt counts as later than all others."""
    base = {record["seed"]: record for record in groups[BASELINE]}
    steps = {record["steps"] for record in base.values()}
    rows = []
    for name, records in groups.items():
        if {record["steps"] for record in records} != steps:
            continue
        row = [name, _mean_and_difference(records, {} if name == BASELINE else base, None)]
        for kind in kinds:
            learnt = [steps_to_learn(record, kind) or math.inf for record in records]
            row += [_mean_and_difference(records, {} if name == BASELINE else base, kind), _median(learnt)]
        rows.append(row)
    return rows


def _mean_and_difference(records: Sequence[Record], base: Mapping[int, Record], kind: str | None) -> str:
    """The mean, and mean ± standard error of the differences within pairs."""
    means = {record["seed"]: mean_over_training(record, kind) for record in records}
    pairs = [mean - mean_over_training(base[seed], kind) for seed, mean in means.items() if seed in base]
    shown = f"{100 * statistics.fmean(means.values()):.1f}"
    if not pairs:
        return shown
    error = f" ± {100 * statistics.stdev(pairs) / len(pairs) ** 0.5:.1f}" if len(pairs) > 1 else ""
    return f"{shown} ({100 * statistics.fmean(pairs):+.1f}{error})"


def _median(steps: Sequence[float]) -> str:
    """The upper one of two, so that it is the step of a validation."""
    middle = statistics.median_high(steps)
    return "not learnt" if middle == math.inf else f"{middle:.0f}"
