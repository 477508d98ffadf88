"""Write answers as they come, so that a killed evaluation loses none and resumes where it stopped."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from alignkd.errors import UserError, raise_if_passing
from alignkd.evaluate.files import Row, read_complete_lines
from alignkd.evaluate.tasks.task import Question
from alignkd.run_folder.atomic_files import flush_to_disk, write_text_atomic


class AnswerWriter:
    """Appends rows to one file that one process owns; ``done`` are the numbers of the questions in it.

    ``answer_id`` is the question's number in the task, from 0: a resumed run then writes the same file as one
    that was never killed.
    """

    def __init__(
        self, path: Path, questions: Sequence[Question], model_id: str, metadata: Mapping[str, Any]
    ) -> None:
        """Opens ``path`` and cuts a torn last line. Raises UserError when its answers are another model's, to
        other questions, or were made with another ``metadata``, and when another process writes it."""
        self._path = path
        self._questions = questions
        self._model_id, self._metadata = model_id, dict(metadata)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            _take_alone(self._file, path)
            _cut_torn_line(path)
            self.done = answered_in(path, questions, model_id, metadata)
        except OSError as error:
            raise_if_passing(error, path)
            raise UserError(f"{path}: cannot be written ({error})") from None

    def __enter__(self) -> AnswerWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, answers: Mapping[int, str]) -> None:
        """Question number -> answer. A process that is killed after this has lost none of them."""
        rows = [
            answer_row(self._questions[number], number, text, self._model_id, self._metadata)
            for number, text in answers.items()
        ]
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        try:
            while data:  # a raw file may take less than all, on a full disk for one
                data = data[self._file.write(data) :]
        except OSError as error:
            raise_if_passing(error, self._path)
            raise UserError(f"{self._path}: cannot be written ({error})") from None
        self.done |= answers.keys()


def answered_in(
    path: Path, questions: Sequence[Question], model_id: str, metadata: Mapping[str, Any]
) -> set[int]:
    """Numbers of the questions that ``path`` answers; a torn last line does not count, and the file may be
    missing. Raises UserError as :class:`AnswerWriter` does."""
    return {_checked(row, questions, model_id, metadata) for row in read_complete_lines(path)}


def _checked(row: Row, questions: Sequence[Question], model_id: str, metadata: Mapping[str, Any]) -> int:
    number = _number(row, len(questions))
    expected = answer_row(questions[number], number, row.text("text"), model_id, metadata)
    for key, value in expected.items():
        if row.value.get(key) != value:
            found, wanted = _difference(row.value.get(key), value)
            raise UserError(
                f"{row.where}: `{key}` is {found:.200}, this evaluation's is {wanted:.200}; move the file "
                "away or give another folder for the answers"
            )
    return number


def _difference(found: object, wanted: object) -> tuple[str, str]:
    """Both, without what is equal in two objects."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [key for key in found | wanted if found.get(key) != wanted.get(key)]
        return tuple(  # type: ignore[return-value]
            repr({key: value[key] for key in keys if key in value}) for value in (found, wanted)
        )
    return repr(found), repr(wanted)


def answer_row(
    question: Question, number: int, text: str, model_id: str, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "question_id": question.question_id,
        "prompt": question.row_prompt,
        "text": text,
        "answer_id": str(number),
        "model_id": model_id,
        "metadata": dict(metadata),
    }


def merge_answers(parts: Sequence[Path], questions: int, out: Path) -> None:
    """Join the files of all ranks in the order of the questions; ``out`` is replaced in one step.

    Raises UserError when a question is answered twice or not at all.
    """
    rows: dict[int, dict[str, Any]] = {}
    for part in parts:
        for row in read_complete_lines(part):
            number = _number(row, questions)
            if number in rows:
                raise UserError(f"{row.where}: answer {number} is in another part already")
            rows[number] = row.value
    missing = [number for number in range(questions) if number not in rows]
    if missing:
        raise UserError(
            f"{out}: {len(missing)} of {questions} answers are missing, first {missing[0]}; "
            "run the evaluation again, it resumes"
        )
    try:
        write_text_atomic(out, "".join(json.dumps(rows[number]) + "\n" for number in range(questions)))
    except OSError as error:
        raise_if_passing(error, out)
        raise UserError(f"{out}: cannot be written ({error})") from None


def _number(row: Row, questions: int) -> int:
    text = row.value.get("answer_id")
    if not isinstance(text, str) or not text.isdecimal() or int(text) >= questions:
        raise UserError(
            f"{row.where}: `answer_id` must be the number of a question, 0 to {questions - 1}, "
            f"found {text!r:.80}; this is no file of an evaluation of the same questions"
        )
    return int(text)


def _take_alone(file: IO[bytes], path: Path) -> None:
    """One process writes a file. Raises UserError; some network file systems have no such locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path}: another evaluation is writing it; wait for its end") from None
    except OSError:
        pass


def _cut_torn_line(path: Path) -> None:
    """A killed process may have written half of its last row; everything after the last newline goes."""
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        kept = end
        while kept > 0:
            start = max(0, kept - 65536)
            file.seek(start)
            newline = file.read(kept - start).rfind(b"\n")
            if newline >= 0:
                kept = start + newline + 1
                break
            kept = start
        if kept < end:
            file.truncate(kept)
            file.flush()
            flush_to_disk(path)
