"""Scores as JSON and as tables: the paper's six numbers, one table per category, two models compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from alignkd.evaluate.statistics import Difference, Estimate, McNemar, mcnemar, paired_difference
from alignkd.evaluate.task_score import SCORE, Numbers, TaskScore
from alignkd.evaluate.tasks.registry import BENCHMARKS

_DECIMALS = 2  # of scores, as papers print them
_ERROR_DECIMALS = 3


def as_json(scores: Sequence[TaskScore]) -> dict[str, Any]:
    """``{"tasks": {"pope": {"score": 85.95, ...}}, "average": ...}``; the average is null without all six."""
    average = paper_average(scores)
    return {
        "tasks": {score.task: task_json(score) for score in scores},
        "average": None if average is None else round(average, _DECIMALS),
    }


def task_json(score: TaskScore) -> dict[str, Any]:
    return {
        **_numbers_json(score.overall),
        "categories": {
            title: {name: _numbers_json(numbers) for name, numbers in rows.items()}
            for title, rows in score.categories.items()
        },
        "settings": score.settings,
        "notes": list(score.notes),
    }


def _numbers_json(numbers: Numbers) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, estimate in numbers.estimates.items():
        error = estimate.standard_error
        found[name] = round(estimate.value, _DECIMALS)
        found["standard_error" if name == SCORE else f"{name}_standard_error"] = (
            None if error is None else round(error, _ERROR_DECIMALS)
        )
    return found | {"questions": numbers.questions}


def paper_average(scores: Sequence[TaskScore]) -> float | None:
    """Mean of the six, MME's perception divided by 20; None unless all six are there."""
    by_task = {score.task: score.score.value for score in scores}
    if not BENCHMARKS.keys() <= by_task.keys():
        return None
    return sum(by_task[name] * task.average_scale for name, task in BENCHMARKS.items()) / len(BENCHMARKS)


def paper_table(models: Mapping[str, Sequence[TaskScore]]) -> Table:
    """One row per model, one column per task that any of them has, like the paper's."""
    tasks = {score.task for scores in models.values() for score in scores}
    shown = [name for name in BENCHMARKS if name in tasks] + sorted(tasks - BENCHMARKS.keys())
    has_average = not tasks.isdisjoint(BENCHMARKS)
    caption = "per cent, MME: sum over perception (2,000), divided by 20 in the average"
    table = Table(title="Scores ± standard error", caption=caption if has_average else "per cent")
    table.add_column("model")
    for name in shown:
        table.add_column(BENCHMARKS[name].title if name in BENCHMARKS else name, justify="right")
    if has_average:
        table.add_column("average", justify="right")
    for model, scores in models.items():
        by_task = {score.task: score.score for score in scores}
        cells = [_cell(by_task[name]) if name in by_task else "-" for name in shown]
        if has_average:
            average = paper_average(scores)
            cells.append("-" if average is None else f"{average:.1f}")
        table.add_row(model, *cells)
    return table


def category_tables(score: TaskScore) -> list[Table]:
    """One table per kind of category, and none for a task without categories."""
    tables = []
    for title, rows in score.categories.items():
        table = Table(title=f"{score.task} by {title}")
        table.add_column(title)
        names = list(dict.fromkeys(name for numbers in rows.values() for name in numbers.estimates))
        for name in names:
            table.add_column(name.replace("_", " "), justify="right")
        table.add_column("questions", justify="right")
        for category, numbers in rows.items():
            cells = [_cell(numbers.estimates[name]) for name in names]
            table.add_row(category, *cells, f"{numbers.questions:,}")
        tables.append(table)
    return tables


def _cell(estimate: Estimate) -> str:
    error = estimate.standard_error
    return f"{estimate.value:.1f}" + ("" if error is None else f" ± {error:.1f}")


@dataclass(frozen=True)
class Comparison:
    task: str
    difference: Difference  # first minus second, on the task's scale
    mcnemar: McNemar | None  # None for a task with partly right answers


def compare(first: Sequence[TaskScore], second: Sequence[TaskScore]) -> list[Comparison]:
    """Two models on the tasks that both answered."""
    others = {score.task: score for score in second}
    return [
        Comparison(
            score.task,
            paired_difference(score.units, others[score.task].units, score.score_of),
            _mcnemar(score, others[score.task]),
        )
        for score in first
        if score.task in others
    ]


def _mcnemar(first: TaskScore, second: TaskScore) -> McNemar | None:
    if first.right is None or second.right is None:
        return None
    return mcnemar(first.right, second.right)


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    test = comparison.mcnemar
    return {
        "difference": round(comparison.difference.value, _DECIMALS),
        "interval_95": [
            round(comparison.difference.low, _DECIMALS),
            round(comparison.difference.high, _DECIMALS),
        ],
        "mcnemar": None
        if test is None
        else {"only_first": test.only_first, "only_second": test.only_second, "p_value": test.p_value},
    }


def comparison_table(first: str, second: str, comparisons: Sequence[Comparison]) -> Table:
    table = Table(title=f"{first} minus {second}")
    table.add_column("task")
    for column in ("difference", "95 % interval", "only first right", "only second right", "McNemar p"):
        table.add_column(column, justify="right")
    for comparison in comparisons:
        difference, test = comparison.difference, comparison.mcnemar
        tested = (
            ("-", "-", "-")
            if test is None
            else (str(test.only_first), str(test.only_second), f"{test.p_value:.2g}")
        )
        table.add_row(
            comparison.task,
            f"{difference.value:+.2f}",
            f"{difference.low:+.2f} to {difference.high:+.2f}",
            *tested,
        )
    return table
