"""The page: its parts in their order. ``page.html.j2`` lays them out and escapes all that it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import jinja2
from markupsafe import Markup

from alignkd.evaluate.statistics import Estimate
from alignkd.evaluate.task_score import SCORE, Numbers
from alignkd.evaluate.tasks.sample import BASELINE
from alignkd.text import counted, duration
from launcher.report import numbers
from launcher.report.answer_pictures import AnswerPicture
from launcher.report.charts import Intervals, Panel, intervals, panel
from launcher.report.columns import AVERAGED_STEPS
from launcher.report.comparisons import Difference
from launcher.report.differences import Key, keys_of
from launcher.report.evaluations import Evaluation, Role, by_questions
from launcher.report.focus_pictures import FocusPicture
from launcher.report.health import facts_of
from launcher.report.run_facts import RunFacts
from launcher.report.sections import sections_of

MAX_RUNS = 8  # as many colours as can be told apart
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Report:
    """Everything that the page shows. The first of ``runs`` is in question; the others are beside it."""

    runs: tuple[RunFacts, ...]
    evaluations: tuple[Evaluation, ...]
    differences: tuple[Difference, ...]
    problems: tuple[str, ...]  # what could not be read or scored
    made: datetime
    focus: tuple[FocusPicture, ...] = ()  # of the first run
    answers: tuple[AnswerPicture, ...] = ()  # of the first run's student


@dataclass(frozen=True)
class TaskScores:
    """The scores of one task as a chart, and the differences of the first run's student below it."""

    title: str
    student: str  # score of the first run's, at its newest step; "-" where only other models answered
    scores: Intervals
    differences: Intervals | None
    verdicts: tuple[Difference, ...]  # of the same student


def render_page(report: Report) -> str:
    """The HTML text: one file, without scripts, and without anything from a network."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": numbers.short, "percent": numbers.percent, "duration": duration}
    main = report.runs[0]
    return environment.get_template("page.html.j2").render(
        report=report,
        main=main,
        made=f"{report.made.astimezone(UTC):%Y-%m-%d %H:%M} UTC",
        style=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        tasks=task_scores(report),
        missing_scores=missing_scores(report),
        sparks={term.name: _spark(main, term.name) for term in main.terms},
        averaged=AVERAGED_STEPS,
        health=facts_of(report.runs),
        sections=sections_of(report.runs),
        categories=category_tables(report.evaluations),
        keys=_keys(report.runs),
        counted=counted,
    )


def task_scores(report: Report) -> list[TaskScores]:
    """One per task and part of it, in the order of the evaluations."""
    found = []
    for members in by_questions(report.evaluations):
        task, part = members[0].task, members[0].part
        compared = [one for one in report.differences if (one.task, one.first.part) == (task, part)]
        questions = counted(members[0].score.overall.questions, "question")
        title = ", ".join(text for text in (task, part, questions) if text)
        student = next((one for one in members if one.is_student_in_question), None)
        found.append(
            TaskScores(
                title,
                "-" if student is None else _student_text(student),
                intervals(map(_score_row, members), with_zero=False),
                intervals(map(_difference_row, compared), with_zero=True) if compared else None,
                tuple(one for one in compared if one.first is student),
            )
        )
    return found


def _score_row(one: Evaluation) -> tuple[int | None, str, str, float, float, float, str]:
    value, low, high = _score(one)
    role = "" if one.name == one.place.role or one.place.run else str(one.place.role)
    return one.place.student_of, one.label, one.qualifier or role, value, low, high, _score_text(one)


def _score(one: Evaluation) -> tuple[float, float, float]:
    """(value, low, high); the interval has no width where there is no standard error."""
    score = one.score.score
    half = 0.0 if score.standard_error is None else numbers.half_interval(score.standard_error)
    return score.value, score.value - half, score.value + half


def _student_text(one: Evaluation) -> str:
    return _score_text(one) + ("" if one.step is None else f" at step {one.step}")


def _score_text(one: Evaluation) -> str:
    value, low, high = _score(one)
    return f"{value:.1f}" + (f" ({low:.1f} to {high:.1f})" if low < high else "")


def _difference_row(one: Difference) -> tuple[int | None, str, str, float, float, float, str]:
    return 0, one.title, one.finding, one.value, one.low, one.high, one.text


def missing_scores(report: Report) -> list[str]:
    """What the first question of the page stays without, and what would answer it."""
    main, roles = report.runs[0], {one.place.role for one in report.evaluations if one.place.run == 0}
    said = []
    if Role.STUDENT not in roles:
        said.append(
            f"No answers of {main.name} were found, so this page cannot say whether it got better: "
            "run alignkd eval RUN --task ... --data ... --out DIR, then alignkd report RUN --eval DIR."
        )
    for role, key in ((Role.START, "student"), (Role.TEACHER, "teacher")):
        if role not in roles and main.model_folder(key) is not None and Role.STUDENT in roles:
            said.append(f"The {role} ({main.model_folder(key)}) was not evaluated.")
    if main.model_folder("student") is None:
        said.append("The student started from random weights: there is no start to compare it with.")
    if main.model_folder("teacher") is None:
        said.append("The run had no teacher.")
    return said


def category_tables(evaluations: Sequence[Evaluation]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows) of each kind of category of each task; one column per model. What has a single
    category says nothing that the score does not."""
    tables = []
    for members in by_questions(evaluations):
        for title, categories in members[0].score.categories.items():
            if len(categories) < 2:
                continue
            rows = []
            for category, first in categories.items():
                cells = [one.score.categories.get(title, {}).get(category) for one in members]
                shown = ["-" if cell is None else _cell(cell.estimates[SCORE]) for cell in cells]
                guessed = [_cell(first.estimates[name]) for name in _guesses(first)]
                rows.append([category, *shown, *guessed, str(first.questions)])
            guesses = [name.replace("_", " ") for name in _guesses(next(iter(categories.values())))]
            columns = [title, *(one.title for one in members), *guesses, "questions"]
            tables.append((f"{members[0].task} by {title}", columns, rows))
    return tables


def _guesses(numbers: Numbers) -> list[str]:
    """What guessing would score, where a task knows."""
    return [name for name in numbers.estimates if name == BASELINE]


def _cell(score: Estimate) -> str:
    half = numbers.half_interval(score.standard_error or 0.0)
    return f"{score.value:.1f}" + (f" ± {half:.1f}" if half else "")


def _spark(run: RunFacts, name: str) -> Panel:
    return panel(name, [(0, run.name, run.columns.points.get(name, []))], logarithmic=True)


def _keys(runs: Sequence[RunFacts]) -> list[Key]:
    return keys_of([run.config for run in runs])
