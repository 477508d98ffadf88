"""What scoring one task gives: the paper's number, others beside it, tables per category."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from alignkd.evaluate.statistics import Estimate, ScoreOf, Units, estimate, percent

SCORE = "score"  # the task's own number, on the paper's scale


@dataclass(frozen=True)
class Numbers:
    """Named numbers over some questions, in per cent unless the task says otherwise."""

    questions: int
    estimates: dict[str, Estimate]


@dataclass(frozen=True)
class TaskScore:
    task: str
    overall: Numbers  # `SCORE` first
    categories: dict[str, dict[str, Numbers]]  # title of a table -> category -> its numbers
    units: Units  # with `score_of`: to compare two models
    score_of: ScoreOf
    right: dict[str, bool] | None  # question -> answered right; None where answers may be partly right
    settings: dict[str, str] = field(default_factory=dict)  # how the answers were made, as far as known
    notes: tuple[str, ...] = ()  # what a reader of the number must know

    @property
    def score(self) -> Estimate:
        return self.overall.estimates[SCORE]


@dataclass(frozen=True)
class Graded:
    """One answered question of a task whose score is a mean: ``credit`` is 0 to 1."""

    key: str
    unit: str  # what was drawn at random: its image, mostly
    credit: float
    categories: tuple[str, ...] = ()  # one per table


def mean_score(
    task: str,
    graded: Sequence[Graded],
    tables: Sequence[str] = (),
    *,
    partly_right: bool = False,
    settings: dict[str, str] | None = None,
    notes: Iterable[str] = (),
) -> TaskScore:
    """The score of a task that is a mean over questions. ``tables`` are titles for ``Graded.categories``."""
    units = _units(graded)
    categories: dict[str, dict[str, Numbers]] = {}
    for number, title in enumerate(tables):
        names = sorted({question.categories[number] for question in graded})
        categories[title] = {
            name: mean_numbers([question for question in graded if question.categories[number] == name])
            for name in names
        }
    return TaskScore(
        task,
        Numbers(len(graded), {SCORE: estimate(units, percent)}),
        categories,
        units,
        percent,
        None if partly_right else {question.key: question.credit == 1.0 for question in graded},
        dict(settings or {}),
        tuple(notes),
    )


def mean_numbers(graded: Sequence[Graded]) -> Numbers:
    return Numbers(len(graded), {SCORE: estimate(_units(graded), percent)})


def _units(graded: Sequence[Graded]) -> Units:
    return Units.of((question.unit, (question.credit, 1.0)) for question in graded)


def size_note(found: int, published: int, what: str = "questions") -> tuple[str, ...]:
    """A note when a file is not of the published size: its score compares with nobody's."""
    if found == published:
        return ()
    return (f"{found:,} {what}; the published file has {published:,}",)
