"""ScienceQA-IMG: the test questions with an image, answered by an option letter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from alignkd.data.records import IMAGE_MARKER
from alignkd.errors import UserError
from alignkd.evaluate.answers import AnswerFile, check_prompts, match
from alignkd.evaluate.files import Row, read_json
from alignkd.evaluate.task_score import SCORE, Graded, Numbers, TaskScore, mean_numbers, mean_score, size_note
from alignkd.evaluate.tasks.layout import EVAL_ZIP, Layout, Needed
from alignkd.evaluate.tasks.letters import scienceqa_letter
from alignkd.evaluate.tasks.pictures import picture_file
from alignkd.evaluate.tasks.task import LONG_ANSWER_TOKENS, OPTION_LETTER, NothingToScore, Question, Task

PUBLISHED_IMAGE_QUESTIONS = 2_017

LAYOUT = Layout(
    "sqa",
    ("scienceqa", "sqa"),
    (
        Needed("questions", ("llava_test_CQM-A.json",), EVAL_ZIP),
        Needed(
            "images",
            ("images/test",),
            "test.zip of ScienceQA, https://github.com/lupantech/ScienceQA",
            for_scoring=False,
            is_folder=True,
        ),
    ),
)


class _Entry(NamedTuple):
    question_id: str
    text: str  # without the image marker and the instruction
    label: str  # option letter
    image: str | None
    where: str


def questions(data: Path) -> list[Question]:
    images = LAYOUT.path(data, "images")
    return [_question(entry, images) for entry in _entries(LAYOUT.path(data, "questions"))]


def _question(entry: _Entry, images: Path) -> Question:
    text = entry.text + OPTION_LETTER
    if entry.image is None:
        return Question(entry.question_id, text, text, (), "text")
    # The official script tells questions with an image by the marker in the answer's `prompt`.
    prompt = f"{IMAGE_MARKER}\n{text}"
    picture = picture_file(images, entry.image, entry.where)
    return Question(entry.question_id, prompt, prompt, (picture,), "image")


def score(data: Path, file: AnswerFile) -> TaskScore:
    """The score is over questions with an image, ``accuracy_all`` over all if all have answers. As in the
    official script a question without an answer is wrong; a note says how many there are."""
    entries = _entries(LAYOUT.path(data, "questions"))
    answers = match(file, [(entry.question_id,) for entry in entries], "sqa")
    pairs = [
        (entry, answer)
        for entry, answer in zip(entries, answers, strict=True)
        if answer is not None or not file.is_partial
    ]
    check_prompts(file, [(answer, entry.text) for entry, answer in pairs if answer is not None], "sqa")
    graded = [
        Graded(
            entry.question_id,
            entry.question_id,
            float(answer is not None and scienceqa_letter(answer.text) == entry.label),
            ("text only" if entry.image is None else "image",),
        )
        for entry, answer in pairs
    ]
    with_image = [question for question in graded if question.categories == ("image",)]
    if not with_image and file.is_partial:
        raise NothingToScore(f"{file.path}: no answered question has an image; valid: a larger --limit")
    if not with_image:
        raise UserError(f"{LAYOUT.path(data, 'questions')}: no question has an image")
    unanswered = sum(entry.image is not None and answer is None for entry, answer in pairs)
    if unanswered == len(with_image):
        raise UserError(f"{file.path}: no question of sqa with an image has an answer")
    notes = list(size_note(len(with_image), PUBLISHED_IMAGE_QUESTIONS, "questions with an image"))
    if unanswered:
        notes.append(f"{unanswered:,} questions with an image have no answer and count as wrong")
    padding = {"image_padding": "not recorded; MobileVLM cuts out the centre, LLaVA pads to a square"}
    result = mean_score("sqa", with_image, settings=padding | file.settings(), notes=notes)
    text_only = [question for question in graded if question.categories != ("image",)]
    if not text_only or any(answer is None for entry, answer in pairs if entry.image is None):
        return result
    accuracy_all = {"accuracy_all": mean_numbers(graded).estimates[SCORE]}
    return replace(
        result,
        overall=Numbers(result.overall.questions, result.overall.estimates | accuracy_all),
        categories={"context": {"image": mean_numbers(with_image), "text only": mean_numbers(text_only)}},
    )


def _entries(path: Path) -> list[_Entry]:
    found = read_json(path)
    if not isinstance(found, list) or not found:
        raise UserError(f"{path}: must be a JSON list of {{id, image, conversations}}")
    return [_entry(value, f"{path}: entry {number}") for number, value in enumerate(found)]


def _entry(value: object, where: str) -> _Entry:
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be an object, found {value!r:.80}")
    row = Row(where, value)
    turns = value.get("conversations")
    if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{where}: `conversations` must be a question and its answer")
    question, label = (
        Row(f"{where}: turn {number}", turn).text("value") for number, turn in enumerate(turns)
    )
    letter = scienceqa_letter(label.strip())
    if letter is None:
        raise UserError(f"{where}: the answer must be an option letter, found {label!r:.80}")
    image = row.text("image") if value.get("image") is not None else None
    return _Entry(row.id("id"), question.replace(IMAGE_MARKER, "").strip(), letter, image, where)


TASK = Task("sqa", "SQA-IMG", LAYOUT, LONG_ANSWER_TOKENS, questions, score, pad_images=False)
