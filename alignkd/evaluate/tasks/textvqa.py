"""TextVQA, validation, with OCR tokens in the prompt: VQA accuracy over ten people's answers."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from alignkd.errors import UserError
from alignkd.evaluate.answers import Answer, AnswerFile, Key, answered
from alignkd.evaluate.files import Row, read_json, read_json_lines
from alignkd.evaluate.task_score import Graded, TaskScore, mean_score, size_note
from alignkd.evaluate.tasks.layout import EVAL_ZIP, Layout, Needed
from alignkd.evaluate.tasks.pictures import picture_file
from alignkd.evaluate.tasks.task import SHORT_ANSWER_TOKENS, Question, Task, image_question
from alignkd.evaluate.tasks.vqa_accuracy import PEOPLE, vqa_accuracy

PUBLISHED_QUESTIONS = 5_000
_OCR = "Reference OCR token:"

LAYOUT = Layout(
    "textvqa",
    ("textvqa",),
    (
        Needed("questions", ("llava_textvqa_val_v051_ocr.jsonl",), EVAL_ZIP, for_scoring=False),
        Needed(
            "labels",
            ("TextVQA_0.5.1_val.json",),
            "https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json",
        ),
        Needed(
            "images",
            ("train_images", "train_val_images/train_images"),
            "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
            for_scoring=False,
            is_folder=True,
        ),
    ),
)


class _Label(NamedTuple):
    image_id: str
    question: str
    answers: tuple[str, ...]


def questions(data: Path) -> list[Question]:
    """Raises UserError for a question file without OCR tokens: models lose 5 to 13 points by it."""
    images = LAYOUT.path(data, "images")
    rows = read_json_lines(LAYOUT.path(data, "questions"))
    for row in rows:
        if _OCR not in row.text("text"):
            raise UserError(
                f"{row.where}: `text` has no line `{_OCR} ...`; the official file is "
                f"{LAYOUT.needed[0].places[0]}, published in {EVAL_ZIP}"
            )
    return [
        image_question(
            row.published_id("question_id"),
            row.text("text"),
            picture_file(images, row.text("image"), row.where),
        )
        for row in rows
    ]


def score(data: Path, file: AnswerFile) -> TaskScore:
    """Answers are found by the image's id and the question in their ``prompt``: ids repeat."""
    labels = _labels(LAYOUT.path(data, "labels"))

    def key_of(answer: Answer) -> Key:
        return (answer.question_id, _asked(answer, file.path).lower())

    keys = [(label.image_id, label.question.lower()) for label in labels]
    pairs = answered(file, labels, keys, "textvqa", key_of)
    graded = [
        Graded(f"{label.image_id} {label.question}", label.image_id, vqa_accuracy(answer.text, label.answers))
        for label, answer in pairs
    ]
    without_ocr = sum(_OCR not in answer.prompt for _, answer in pairs)
    notes = size_note(len(graded), PUBLISHED_QUESTIONS)
    if without_ocr:
        notes += (f"{without_ocr:,} questions were asked without OCR tokens: lower by 5 to 13 points",)
    return mean_score("textvqa", graded, partly_right=True, settings=file.settings(), notes=notes)


def _asked(answer: Answer, path: Path) -> str:
    """The question in the prompt: three lines with the OCR tokens before or after it, or two without."""
    lines = answer.prompt.split("\n")
    if len(lines) == 3 and _OCR in answer.prompt:
        return lines[1] if lines[0].startswith(_OCR) else lines[0]
    if len(lines) == 2:
        return lines[0]
    raise UserError(
        f"{path}: line {answer.line}: `prompt` must be a question, the line `{_OCR} ...` and the "
        f"instruction, found {answer.prompt!r:.160}"
    )


def _labels(path: Path) -> list[_Label]:
    found = read_json(path)
    entries = found.get("data") if isinstance(found, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f'{path}: must be {{"data": [{{image_id, question, answers}}, ...]}}')
    return [_label(value, f"{path}: entry {number}") for number, value in enumerate(entries)]


def _label(value: object, where: str) -> _Label:
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be an object, found {value!r:.80}")
    row = Row(where, value)
    answers = value.get("answers")
    if (
        not isinstance(answers, list)
        or len(answers) != PEOPLE
        or not all(isinstance(answer, str) for answer in answers)
    ):
        raise UserError(
            f"{where}: `answers` must be {PEOPLE} texts; the test split is published without them"
        )
    return _Label(row.id("image_id"), row.text("question"), tuple(answers))


TASK = Task("textvqa", "TextVQA", LAYOUT, SHORT_ANSWER_TOKENS, questions, score)
