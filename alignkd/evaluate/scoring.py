"""Score answer files, and check that a benchmark's data are complete before hours are spent on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alignkd.errors import UserError
from alignkd.evaluate.answers import read_answers
from alignkd.evaluate.task_score import TaskScore
from alignkd.evaluate.tasks.layout import require
from alignkd.evaluate.tasks.pictures import missing_pictures
from alignkd.evaluate.tasks.task import Task

_SHOWN_PICTURES = 3


def score_file(task: Task, answers: Path, data: Path, *, partial: bool = False) -> TaskScore:
    """Score one answer file; ``data`` is the folder of all benchmarks or the task's own. ``partial``: only
    some questions were asked.

    Raises MissingData or UserError.
    """
    require([task.layout], data, scoring_only=True)
    return task.score(data, read_answers(answers, partial=partial))


def check_data(tasks: Sequence[Task], data: Path) -> dict[str, int]:
    """Number of questions per task, when all files and pictures of all tasks are there.

    Raises one MissingData that lists every file that is not, or one UserError for all missing pictures.
    """
    require([task.layout for task in tasks], data, scoring_only=False)
    counts, problems = {}, []
    for task in tasks:
        questions = task.questions(data)
        counts[task.name] = len(questions)
        missing = missing_pictures(picture for question in questions for picture in question.pictures)
        if missing:
            shown = ", ".join(str(picture) for picture in missing[:_SHOWN_PICTURES])
            problems.append(f"  {task.name}: {len(missing):,} pictures are missing, such as {shown}")
    if problems:
        raise UserError("\n".join([f"{data}: pictures that the questions ask about are missing", *problems]))
    return counts
