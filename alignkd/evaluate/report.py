"""What an evaluation prints and writes at its end: scores of all models and tasks, and their comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from alignkd.evaluate import score_report
from alignkd.evaluate.task_score import TaskScore

Scores = Mapping[str, Sequence[TaskScore]]  # name of a model -> its tasks


def report_json(models: Scores, limit: int | None) -> dict[str, Any]:
    """``{"models": {NAME: {"tasks": ..., "average": ...}}, "comparisons": [...], "limit": null}``; each model
    but the first is compared with the first. ``limit``: only that many questions of each task were asked."""
    first, *others = models
    return {
        "models": {name: score_report.as_json(scores) for name, scores in models.items()},
        "comparisons": [
            {"first": first, "second": other, "task": found.task} | score_report.comparison_json(found)
            for other in others
            for found in score_report.compare(models[first], models[other])
        ],
        "limit": limit,
    }


def print_report(models: Scores, console: Console, *, categories: bool, limit: int | None) -> None:
    table = score_report.paper_table(models)
    if limit is not None:
        table.title = f"PARTIAL: the first {limit:,} questions of each task"
    console.print(table)
    of_all = [(name, score) for name, scores in models.items() for score in scores]
    if categories:
        for name, score in of_all:
            for table in score_report.category_tables(score):
                table.title = f"{name}: {table.title}"
                console.print(table)
    first, *others = models
    for other in others:
        found = score_report.compare(models[first], models[other])
        console.print(score_report.comparison_table(first, other, found))
    for note in notes_of(models):
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def notes_of(models: Scores) -> list[str]:
    """What the scores do not say by themselves, and how the answers were made."""
    of_all = [score for scores in models.values() for score in scores]
    notes = [f"{score.task}: {note}" for score in of_all for note in score.notes]
    return [*dict.fromkeys(notes), *_settings(models)]


def _settings(models: Scores) -> list[str]:
    """How the answers were made, one line per model and kind of settings."""
    tasks: dict[tuple[str, str], list[str]] = {}
    for name, scores in models.items():
        for score in scores:
            shown = ", ".join(f"{key} {value}" for key, value in score.settings.items())
            tasks.setdefault((name, shown), []).append(score.task)
    return [f"{name}, {', '.join(of_model)}: {shown}" for (name, shown), of_model in tasks.items() if shown]
