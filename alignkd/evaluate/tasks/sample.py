"""The digits of `alignkd sample-data`: exact answers per kind of question, beside the most frequent one."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

from alignkd.evaluate.answers import AnswerFile
from alignkd.evaluate.statistics import Estimate
from alignkd.evaluate.task_score import Numbers, TaskScore
from alignkd.evaluate.tasks.layout import Layout, Needed
from alignkd.evaluate.tasks.own import KIND, Record, question_of, read_records, score_records
from alignkd.evaluate.tasks.task import Question, Task

BASELINE = "most_frequent_answer"
ANSWER_TOKENS = 16

LAYOUT = Layout(
    "sample",
    ("sample",),
    (
        Needed("questions", ("test.json",), "the folder that `alignkd sample-data` writes"),
        Needed(
            "images",
            ("images",),
            "the folder that `alignkd sample-data` writes",
            for_scoring=False,
            is_folder=True,
        ),
    ),
)


def questions(data: Path) -> list[Question]:
    images = LAYOUT.path(data, "images")
    return [question_of(record, images) for record in _records(data)]


def score(data: Path, file: AnswerFile) -> TaskScore:
    """Kinds come with the most frequent one first. The baseline guesses separately for each kind."""
    records = _records(data)
    result = score_records(records, file, "sample", "exact")
    known = {answer.question_id for answer in file.answers}
    records = [record for record in records if record.sample.id in known]  # of a partial file
    expected: dict[str, list[str]] = defaultdict(list)
    for record in records:
        expected[record.kind].append(record.expected[0].strip())
    guessed = {kind: Counter(answers).most_common(1)[0][1] for kind, answers in expected.items()}
    by_size = sorted(expected, key=lambda kind: -len(expected[kind]))
    kinds = {
        kind: _beside(result.categories[KIND][kind], guessed[kind] / len(expected[kind])) for kind in by_size
    }
    overall = _beside(result.overall, sum(guessed.values()) / len(records))
    return replace(result, overall=overall, categories={KIND: kinds})


def _beside(numbers: Numbers, share: float) -> Numbers:
    return replace(numbers, estimates=numbers.estimates | {BASELINE: Estimate(100 * share, None)})


def _records(data: Path) -> list[Record]:
    return read_records(LAYOUT.path(data, "questions"), "exact")


TASK = Task("sample", "digits", LAYOUT, ANSWER_TOKENS, questions, score)
