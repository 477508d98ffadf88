"""The tables at the end of the demo: accuracy, losses and cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from alignkd.evaluate.task_score import SCORE, Numbers, TaskScore
from alignkd.evaluate.tasks.own import KIND
from alignkd.evaluate.tasks.sample import BASELINE
from alignkd.run_folder.metrics import iter_rows
from alignkd.run_folder.paths import RunPaths

TERMS = ("loss", "ce", "reverse_kl", "attention", "vision_all", "vision_focus")
AVERAGED_STEPS = 10  # the loss of a single step is too noisy to compare
MEBIBYTE = 2**20


@dataclass(frozen=True)
class TrainedModel:
    """A finished run and the score of its model."""

    name: str
    score: TaskScore  # of its answers to the sample task
    rows: list[dict[str, Any]]  # metrics.jsonl
    seconds: float
    peak_memory_bytes: list[int]  # per rank

    @classmethod
    def of_run(cls, name: str, run: Path, score: TaskScore) -> TrainedModel:
        result = json.loads(RunPaths(run).result.read_text(encoding="utf-8"))
        rows = list(iter_rows(RunPaths(run).metrics))
        return cls(name, score, rows, float(result["seconds"]), result["peak_memory_bytes_per_rank"])


def accuracy_table(scores: Mapping[str, TaskScore]) -> Table:
    """One row per kind of question, with the accuracy of each model and of the majority baseline."""
    table = Table(title="exact answers to unseen digits, by greedy generation")
    table.add_column("kind of question")
    for name in scores:
        table.add_column(name, justify="right")
    table.add_column("most frequent answer", justify="right")
    table.add_column("questions", justify="right")
    for kind in (*next(iter(scores.values())).categories[KIND], None):
        cells = [score.overall if kind is None else score.categories[KIND][kind] for score in scores.values()]
        shown = [_share(cell, SCORE) for cell in cells]
        table.add_row(kind or "all", *shown, _share(cells[0], BASELINE), str(cells[0].questions))
    return table


def _share(numbers: Numbers, name: str) -> str:
    return f"{numbers.estimates[name].value / 100:.3f}"


def loss_table(models: Sequence[TrainedModel]) -> Table:
    """The mean of each term over the first and the last steps of each run."""
    table = Table(title=f"losses, first {AVERAGED_STEPS} steps -> last {AVERAGED_STEPS}")
    table.add_column("term")
    for model in models:
        table.add_column(model.name, justify="right")
    for term in TERMS:
        table.add_row(term, *(_first_and_last(model.rows, term) for model in models))
    return table


def cost_table(models: Sequence[TrainedModel]) -> Table:
    table = Table(title="cost")
    for column in ("run", "steps", "minutes", "samples/s", "peak memory of each rank, MiB"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for model in models:
        rates = sorted(row["samples_per_second"] for row in model.rows)
        memory = ", ".join(f"{value / MEBIBYTE:.0f}" for value in model.peak_memory_bytes)
        table.add_row(
            model.name,
            str(model.rows[-1]["step"]),
            f"{model.seconds / 60:.1f}",
            f"{rates[len(rates) // 2]:.0f}",
            memory,
        )
    return table


def print_report(
    models: Sequence[TrainedModel], console: Console, exported: Mapping[str, TaskScore] | None = None
) -> None:
    """``exported``: scores of further models, which no run of their own has made."""
    scores = {model.name: model.score for model in models} | dict(exported or {})
    for table in (loss_table(models), cost_table(models), accuracy_table(scores)):
        console.print()
        console.print(table)


def print_agreement(name: str, student: Path, exported: Path, console: Console) -> None:
    """How often two files of answers to the same questions agree."""
    first, second = (
        [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
        for file in (student, exported)
    )
    equal = sum(one == other for one, other in zip(first, second, strict=True))
    console.print(f"{name} answers {equal} of {len(first)} questions as the student does")


def _first_and_last(rows: Sequence[dict[str, Any]], term: str) -> str:
    """Empty for a term that is not part of the run."""
    first, last = (_mean(part, term) for part in (rows[:AVERAGED_STEPS], rows[-AVERAGED_STEPS:]))
    if first == last == 0.0:
        return ""
    return f"{first:.3g} -> {last:.3g}"


def _mean(rows: Sequence[dict[str, Any]], term: str) -> float:
    return float(sum(row.get(term, 0.0) for row in rows)) / len(rows)
