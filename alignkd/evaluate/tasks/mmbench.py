"""MMBench, dev: option letters; a question is right when every rotation of its options is answered right."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from alignkd.evaluate.answers import Answer, AnswerFile, answered, check_prompts
from alignkd.evaluate.statistics import Units, estimate, percent
from alignkd.evaluate.task_score import SCORE, Graded, Numbers, TaskScore, mean_score, size_note
from alignkd.evaluate.tasks.layout import Layout, Needed
from alignkd.evaluate.tasks.letters import mmbench_letter
from alignkd.evaluate.tasks.mmbench_table import TableRow, encoded_image, read_table, write_upload
from alignkd.evaluate.tasks.pictures import EncodedPicture
from alignkd.evaluate.tasks.task import (
    LONG_ANSWER_TOKENS,
    OPTION_LETTER,
    Question,
    Task,
    image_question,
)

PUBLISHED_ROWS = 4_377
_TABLES = ("l2-category", "category")
_SITE = "https://download.openmmlab.com/mmclassification/datasets/mmbench/"

LAYOUT = Layout(
    "mmbench",
    ("mmbench",),
    (
        Needed(
            "table",
            ("mmbench_dev_20230712.tsv", "mmbench_dev_en_20231003.tsv", "MMBench_DEV_EN.tsv"),
            f"{_SITE}mmbench_dev_20230712.tsv",
        ),
    ),
)


def questions(data: Path) -> list[Question]:
    rows = read_table(LAYOUT.path(data, "table"))
    by_index = {row.index: row for row in rows}
    return [
        image_question(
            row.index,
            row.text() + OPTION_LETTER,
            EncodedPicture(row.where, encoded_image(row, by_index)),
            row.cells.get("category", ""),
        )
        for row in rows
    ]


def score(data: Path, file: AnswerFile) -> TaskScore:
    rows = read_table(LAYOUT.path(data, "table"))
    pairs = _answered(rows, file)
    rotations: dict[int, list[tuple[TableRow, bool]]] = defaultdict(list)
    for row, answer in pairs:
        is_right = mmbench_letter(answer.text, row.options()) == row.answer()
        rotations[row.question].append((row, is_right))
    graded = [
        Graded(
            str(question),
            str(question),
            float(all(is_right for _, is_right in rotated)),
            tuple(rotated[0][0].cells.get(column, "") or "other" for column in _TABLES),
        )
        for question, rotated in rotations.items()
    ]
    notes = list(size_note(len(pairs), PUBLISHED_ROWS, "rows"))
    if len(graded) == len(pairs):
        notes.append("the file has no rotations: this is plain accuracy, not the circular one")
    result = mean_score("mmbench", graded, _TABLES, settings=file.settings(), notes=notes)
    plain = Units.of(
        (str(question), (float(is_right), 1.0))
        for question, rotated in rotations.items()
        for _, is_right in rotated
    )
    estimates = {SCORE: result.score, "accuracy_of_rows": estimate(plain, percent)}
    return replace(result, overall=Numbers(len(graded), estimates))


def write_upload_file(data: Path, file: AnswerFile, out: Path) -> None:
    """What MMBench's server scores; also for the test split, which has no answers here."""
    rows = read_table(LAYOUT.path(data, "table"))
    write_upload(rows, [answer.text for _, answer in _answered(rows, file)], out)


def _answered(rows: list[TableRow], file: AnswerFile) -> list[tuple[TableRow, Answer]]:
    pairs = answered(file, rows, [(str(row.index),) for row in rows], "mmbench")
    check_prompts(file, [(answer, row.cells["question"]) for row, answer in pairs], "mmbench")
    return pairs


TASK = Task("mmbench", "MMBench-dev", LAYOUT, LONG_ANSWER_TOKENS, questions, score)
