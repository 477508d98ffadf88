"""Right and wrong answers of the student, with their images."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from alignkd.config.schema import DEFAULT_MAX_IMAGE_PIXELS
from alignkd.errors import UserError
from alignkd.evaluate.answers import read_answers
from alignkd.evaluate.tasks.pictures import Picture, open_picture
from alignkd.evaluate.tasks.task import Question
from launcher.report.evaluations import Evaluation, by_questions

THUMBNAIL = 168  # pixels per side, at most
_QUALITY = 85  # of its JPEG
_MOST_TEXT = 300  # characters of a question or an answer


@dataclass(frozen=True)
class Said:
    model: str
    text: str
    right: bool


@dataclass(frozen=True)
class AnswerPicture:
    task: str
    question: str
    images: tuple[str, ...]  # data URIs
    problem: str  # why an image is not shown
    said: tuple[Said, ...]  # the student's answer, then those of the other models

    @property
    def right(self) -> bool:
        return self.said[0].right


def answer_pictures(evaluations: Sequence[Evaluation], count: int) -> list[AnswerPicture]:
    """Up to ``count`` wrong and as many right answers to each task, evenly spread over the questions. Tasks
    with partly right answers have none. Raises UserError for questions that cannot be read."""
    found = []
    for members in by_questions(evaluations):
        student, right = members[0], members[0].score.right
        if not student.is_student_in_question or right is None:
            continue
        models = [one for one in members if one.score.right is not None]
        texts = [
            {answer.question_id: answer.text for answer in read_answers(one.file).answers} for one in models
        ]
        questions = [one for one in student.questions() if str(one.question_id) in right]
        for wanted in (False, True):
            answered = [one for one in questions if right[str(one.question_id)] is wanted]
            for question in _spread(answered, count):
                said = tuple(
                    _said(one, of_model, question) for one, of_model in zip(models, texts, strict=True)
                )
                images, problem = _images(question.pictures)
                found.append(
                    AnswerPicture(student.task, question.row_prompt[:_MOST_TEXT], images, problem, said)
                )
    return found


def _said(one: Evaluation, texts: dict[str, str], question: Question) -> Said:
    key = str(question.question_id)
    return Said(one.title, texts.get(key, "")[:_MOST_TEXT], bool((one.score.right or {}).get(key)))


def _spread(questions: Sequence[Question], count: int) -> list[Question]:
    chosen = min(count, len(questions))
    return [questions[number * len(questions) // chosen] for number in range(chosen)]


def _images(pictures: Sequence[Picture]) -> tuple[tuple[str, ...], str]:
    try:
        return tuple(_thumbnail(picture) for picture in pictures), ""
    except UserError as error:
        return (), str(error)


def _thumbnail(picture: Picture) -> str:
    image = open_picture(picture, DEFAULT_MAX_IMAGE_PIXELS)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
