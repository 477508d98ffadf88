"""Is the student better? Its score beside those of its start, its teacher and the other runs' students."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alignkd.evaluate.score_report import compare
from launcher.report.evaluations import Evaluation, by_questions
from launcher.report.numbers import MINUS, signed

SIGNIFICANT = 0.05  # p of a test that goes with 95 % intervals


@dataclass(frozen=True)
class Difference:
    """First minus second, on the task's scale, over the same questions."""

    task: str
    first: Evaluation
    second: Evaluation
    value: float
    low: float  # of the 95 % interval
    high: float
    p_value: float | None  # McNemar's; None where answers may be partly right

    @property
    def title(self) -> str:
        return f"{self.first.title} {MINUS} {self.second.title}"

    @property
    def verdict(self) -> str:
        """What the interval and the test say, and no more."""
        if None in (self.first.score.score.standard_error, self.second.score.score.standard_error):
            return "too few questions"
        if self.low == self.high and self.value != 0:
            return "no interval"  # all questions differ alike: the bootstrap cannot say how far that holds
        if self.p_value is not None and self.p_value >= SIGNIFICANT:
            return "no difference shown"
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no difference shown"

    @property
    def finding(self) -> str:
        """The verdict, with the test's p where there is one."""
        if self.p_value is None:
            return self.verdict
        return f"{self.verdict}, p {'< 0.001' if self.p_value < 0.001 else f'= {self.p_value:.2g}'}"

    @property
    def text(self) -> str:
        value = signed(self.value)
        return value if self.low == self.high else f"{value} ({signed(self.low)} to {signed(self.high)})"


def differences(evaluations: Sequence[Evaluation]) -> tuple[list[Difference], list[str]]:
    """Of each task, the first run's student minus every other model; and what could not be compared.

    ``evaluations`` are in the order of `find_evaluations`. Steps of the student are compared with each other
    once: the newer minus the older.
    """
    found, problems = [], []
    for members in by_questions(evaluations):
        for number, student in enumerate(members):
            if not student.is_student_in_question:
                continue
            for other in members[number + 1 :]:
                try:
                    found.append(_difference(student, other))
                except ValueError as error:
                    problems.append(f"{student.file} and {other.file}: not compared: {error}")
    return found, problems


def _difference(student: Evaluation, other: Evaluation) -> Difference:
    """Raises ValueError for answers to different questions."""
    (comparison,) = compare([student.score], [other.score])
    test, difference = comparison.mcnemar, comparison.difference
    return Difference(
        student.task,
        student,
        other,
        difference.value,
        difference.low,
        difference.high,
        None if test is None else test.p_value,
    )
