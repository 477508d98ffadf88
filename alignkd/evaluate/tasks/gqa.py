"""GQA, test-dev balanced: short answers, exact match."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignkd.errors import UserError
from alignkd.evaluate.answers import AnswerFile, answered, check_prompts
from alignkd.evaluate.files import Row, read_json, read_json_lines
from alignkd.evaluate.task_score import Graded, TaskScore, mean_score, size_note
from alignkd.evaluate.tasks.layout import EVAL_ZIP, Layout, Needed
from alignkd.evaluate.tasks.pictures import picture_file
from alignkd.evaluate.tasks.task import SHORT_ANSWER_TOKENS, Question, Task, image_question

PUBLISHED_QUESTIONS = 12_578
_SITE = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
_TABLES = {"structural": "structural type", "semantic": "semantic type"}

LAYOUT = Layout(
    "gqa",
    ("gqa",),
    (
        Needed("questions", ("llava_gqa_testdev_balanced.jsonl",), EVAL_ZIP, for_scoring=False),
        Needed(
            "labels",
            (
                "data/testdev_balanced_questions.json",
                "testdev_balanced_questions.json",
                "data/questions1.2/testdev_balanced_questions.json",
            ),
            f"questions1.2.zip, {_SITE}",
        ),
        Needed(
            "images", ("data/images", "images"), f"images.zip, {_SITE}", for_scoring=False, is_folder=True
        ),
    ),
)


def questions(data: Path) -> list[Question]:
    images = LAYOUT.path(data, "images")
    return [
        image_question(
            row.published_id("question_id"),
            row.text("text"),
            picture_file(images, row.text("image"), row.where),
            str(row.value.get("category", "")),
        )
        for row in read_json_lines(LAYOUT.path(data, "questions"))
    ]


def is_right(text: str, label: str) -> bool:
    return text.rstrip(".").lower() == label


def score(data: Path, file: AnswerFile) -> TaskScore:
    labels = _labels(LAYOUT.path(data, "labels"))
    pairs = answered(file, list(labels.values()), [(question_id,) for question_id in labels], "gqa")
    asked = [(answer, label.value.get("question")) for label, answer in pairs]
    check_prompts(file, [(answer, text) for answer, text in asked if isinstance(text, str)], "gqa")
    graded = [
        Graded(
            answer.question_id,
            str(label.value.get("imageId", answer.question_id)),
            float(is_right(answer.text, label.text("answer"))),
            tuple(_type(label.value, key) for key in _TABLES),
        )
        for label, answer in pairs
    ]
    return mean_score(
        "gqa",
        graded,
        tuple(_TABLES.values()),
        settings=file.settings(),
        notes=size_note(len(graded), PUBLISHED_QUESTIONS),
    )


def _labels(path: Path) -> dict[str, Row]:
    """Balanced questions only, as the official script does."""
    found = read_json(path)
    if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()):
        raise UserError(f"{path}: must be a JSON object of question id -> {{answer, isBalanced, imageId}}")
    labels = {
        question_id: Row(f"{path}: question {question_id}", value)
        for question_id, value in found.items()
        if value.get("isBalanced", True)
    }
    if not labels:
        raise UserError(f"{path}: holds no balanced question")
    return labels


def _type(question: dict[str, Any], key: str) -> str:
    types = question.get("types")
    return str(types.get(key, "other")) if isinstance(types, dict) else "other"


TASK = Task("gqa", "GQA", LAYOUT, SHORT_ANSWER_TOKENS, questions, score)
