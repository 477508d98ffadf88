"""The common shape of all tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from alignkd.data.records import IMAGE_MARKER, Turn
from alignkd.errors import UserError
from alignkd.evaluate.answers import AnswerFile
from alignkd.evaluate.task_score import TaskScore
from alignkd.evaluate.tasks.layout import Layout
from alignkd.evaluate.tasks.pictures import Picture

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."

SHORT_ANSWER_TOKENS = 128
LONG_ANSWER_TOKENS = 1024


@dataclass(frozen=True)
class Question:
    question_id: str | int  # as published: it goes into the answer's row
    prompt: str  # the user's turn, with the marker `<image>` where the picture goes
    row_prompt: str  # `prompt` of the answer's row
    pictures: tuple[Picture, ...]
    category: str = ""
    earlier: tuple[Turn, ...] = ()  # turns before `prompt`


class NothingToScore(UserError):
    """The first questions of a task, asked with a limit, hold nothing that its rules can score."""


@dataclass(frozen=True)
class Task:
    name: str
    title: str  # of its column in the paper's table
    layout: Layout
    max_new_tokens: int
    questions: Callable[[Path], list[Question]]  # folder of the data -> questions in their order
    score: Callable[[Path, AnswerFile], TaskScore]  # folder of the data and answers -> score
    pad_images: bool = True  # to a square, before resizing; otherwise the centre is cut out
    average_scale: float = 1.0  # the score counts times this in the average over tasks


def image_question(question_id: str | int, text: str, picture: Picture, category: str = "") -> Question:
    """The usual question: one picture, then the text; the row's prompt is the text alone."""
    return Question(question_id, f"{IMAGE_MARKER}\n{text}", text, (picture,), category)
