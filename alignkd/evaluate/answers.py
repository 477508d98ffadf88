"""Read answers in LLaVA's format and match them with the questions they answer.

A row is ``{"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}``; only ``question_id`` and
``text`` must be there. Files come from anywhere, so nothing is trusted: a file that answers something else
must not get a score.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from alignkd.errors import UserError
from alignkd.evaluate.files import Row, read_json_lines

Label = TypeVar("Label")
Key = tuple[str, ...]  # what identifies a question: its id, for some tasks with its text


@dataclass(frozen=True)
class Answer:
    question_id: str
    prompt: str  # empty when the row has none
    text: str
    line: int  # from 1
    metadata: dict[str, Any]


@dataclass(frozen=True)
class AnswerFile:
    path: Path
    answers: tuple[Answer, ...]
    models: tuple[str, ...]  # distinct `model_id`s
    is_partial: bool = False  # only some questions were asked: those without an answer do not count

    def settings(self) -> dict[str, str]:
        """How the answers were made (precision, batch size, padding), where ``metadata`` says so.

        Values that differ between rows are joined, so that a mixed file shows.
        """
        values: dict[str, dict[str, None]] = defaultdict(dict)
        for answer in self.answers:
            for key, value in answer.metadata.items():
                values[key][value if isinstance(value, str) else json.dumps(value)] = None
        return {key: " and ".join(found) for key, found in values.items()}


def read_answers(path: Path, *, partial: bool = False) -> AnswerFile:
    """Raises UserError, naming the line, for a file that is not in this format."""
    rows = read_json_lines(path)
    models: dict[str, None] = {}
    answers = []
    for row in rows:
        answers.append(_answer(row))
        if isinstance(row.value.get("model_id"), str):
            models[row.value["model_id"]] = None
    return AnswerFile(path, tuple(answers), tuple(models), partial)


def _answer(row: Row) -> Answer:
    try:
        question_id, text = row.id("question_id"), row.text("text")
    except UserError as error:
        raise UserError(
            f'{error}; an answer is {{"question_id": ..., "prompt": "...", "text": "..."}}'
        ) from None
    prompt, metadata = row.value.get("prompt"), row.value.get("metadata")
    return Answer(
        question_id,
        prompt if isinstance(prompt, str) else "",
        text,
        int(row.where.rsplit(" ", 1)[1]),
        metadata if isinstance(metadata, dict) else {},
    )


def id_key(answer: Answer) -> Key:
    return (answer.question_id,)


def match(
    file: AnswerFile,
    keys: Sequence[Key],
    task: str,
    key_of: Callable[[Answer], Key] = id_key,
) -> list[Answer | None]:
    """The answer to each of ``keys``; None where there is none. A key that occurs twice takes two answers.

    Raises UserError for a file of another benchmark, unknown questions and repeated answers.
    """
    waiting: dict[Key, list[int]] = defaultdict(list)
    for number, key in enumerate(keys):
        waiting[key].append(number)
    found: list[Answer | None] = [None] * len(keys)
    last_line: dict[Key, int] = {}
    unknown = [answer for answer in file.answers if key_of(answer) not in waiting]
    if len(unknown) == len(file.answers):
        raise UserError(
            f"{file.path}: none of its {len(unknown)} answers is to a question of {task}: it begins with "
            f"{_shown(key_of(unknown[0]))}, {task} with {_shown(keys[0])}"
        )
    if unknown:
        raise UserError(
            f"{file.path}: line {unknown[0].line}: {task} has no question {_shown(key_of(unknown[0]))}; "
            f"{len(unknown)} of {len(file.answers)} answers are to unknown questions"
        )
    for answer in file.answers:
        key = key_of(answer)
        if not waiting[key]:
            raise UserError(
                f"{file.path}: line {answer.line}: question {_shown(key)} is answered again (first in line "
                f"{last_line[key]}); every question needs exactly one answer"
            )
        found[waiting[key].pop(0)] = answer
        last_line[key] = answer.line
    return found


def match_all(
    file: AnswerFile,
    keys: Sequence[Key],
    task: str,
    key_of: Callable[[Answer], Key] = id_key,
) -> list[Answer]:
    """``match``, and every question must have an answer."""
    found = match(file, keys, task, key_of)
    missing = [key for key, answer in zip(keys, found, strict=True) if answer is None]
    if missing:
        raise UserError(
            f"{file.path}: {len(missing)} of the {len(keys)} questions of {task} have no answer, first "
            f"{_shown(missing[0])}; was the evaluation stopped early?"
        )
    return [answer for answer in found if answer is not None]


def answered(
    file: AnswerFile,
    labels: Sequence[Label],
    keys: Sequence[Key],
    task: str,
    key_of: Callable[[Answer], Key] = id_key,
) -> list[tuple[Label, Answer]]:
    """Labels with their answers, as ``match_all`` finds them; of a partial file those that have one."""
    if not file.is_partial:
        return list(zip(labels, match_all(file, keys, task, key_of), strict=True))
    found = match(file, keys, task, key_of)
    return [(label, answer) for label, answer in zip(labels, found, strict=True) if answer is not None]


def check_prompts(file: AnswerFile, pairs: Sequence[tuple[Answer, str]], task: str) -> None:
    """Raises UserError where an answer's ``prompt`` does not hold the question that has its id.

    Ids alone do not tell two releases of a benchmark apart.
    """
    for answer, question in pairs:
        if answer.prompt and _squeezed(question) not in _squeezed(answer.prompt):
            raise UserError(
                f"{file.path}: line {answer.line}: asked {answer.prompt!r:.160}, but question "
                f"{answer.question_id} of {task} is {question!r:.160}: the answers are to another release"
            )


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _shown(key: Key) -> str:
    return " ".join(f"{part!r:.120}" for part in key)
