"""Anyone's own questions: a LLaVA-style JSON whose last turns are the expected answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignkd.config.dotted import did_you_mean
from alignkd.data.records import IMAGE_MARKER, Sample, parse_sample
from alignkd.errors import UserError
from alignkd.evaluate.answers import AnswerFile, answered
from alignkd.evaluate.files import read_json
from alignkd.evaluate.task_score import Graded, TaskScore, mean_score
from alignkd.evaluate.tasks.layout import Layout, Needed
from alignkd.evaluate.tasks.letters import scienceqa_letter
from alignkd.evaluate.tasks.mme import yes_or_no
from alignkd.evaluate.tasks.pictures import picture_file
from alignkd.evaluate.tasks.task import SHORT_ANSWER_TOKENS, Question, Task
from alignkd.evaluate.tasks.vqa_accuracy import PEOPLE, vqa_accuracy

KIND = "kind"  # title of the table per kind
_DEFAULT_KIND = "question"


class Record(NamedTuple):
    sample: Sample
    kind: str
    expected: tuple[str, ...]  # one answer, or ten people's
    where: str


Rule = Callable[[str, tuple[str, ...]], float]


def _exact(text: str, expected: tuple[str, ...]) -> float:
    return float(text.strip() == expected[0].strip())


def _vqa(text: str, expected: tuple[str, ...]) -> float:
    """One expected answer stands for ten equal ones."""
    return vqa_accuracy(text, expected if len(expected) == PEOPLE else expected * PEOPLE)


def _letter(text: str, expected: tuple[str, ...]) -> float:
    return float(scienceqa_letter(text.strip()) == expected[0].strip())


def _yes_no(text: str, expected: tuple[str, ...]) -> float:
    return float(yes_or_no(text.strip()) is (expected[0].strip().lower() == "yes"))


# Metric -> its rule and what an expected answer must be.
METRICS: dict[str, tuple[Rule, str, Callable[[str], bool]]] = {
    "exact": (_exact, "a text", lambda label: True),
    "vqa": (_vqa, "a text", lambda label: True),
    "letter": (_letter, "an option letter, A to E", lambda label: label in tuple("ABCDE")),
    "yes-no": (_yes_no, "yes or no", lambda label: label.lower() in ("yes", "no")),
}


def own_task(data: Path, questions: str, image_folder: Path | None, metric: str) -> Task:
    """The task that ``questions``, a file below ``data``, is. ``image_folder``: the file's own if None.

    A record is {"id", "image", "conversations"}; `kind` names its row of the table per kind, `answers` may
    hold ten people's answers for ``vqa``. Raises UserError for an unknown metric; problems of the file are
    raised when it is read.
    """
    if metric not in METRICS:
        raise UserError(
            f"metric {metric!r:.80} is unknown; valid: {', '.join(METRICS)}{did_you_mean(metric, METRICS)}"
        )
    file = data / questions
    images = image_folder if image_folder is not None else file.parent
    layout = Layout("own", (".",), (Needed("questions", (questions,), "a file of your own"),))
    return Task(
        "own",
        "own",
        layout,
        SHORT_ANSWER_TOKENS,
        lambda _: [question_of(record, images) for record in read_records(file, metric)],
        lambda _, answers: score_records(read_records(file, metric), answers, "own", metric),
    )


def question_of(record: Record, images: Path) -> Question:
    *earlier, asked, _ = record.sample.turns
    pictures = tuple(picture_file(images, path, record.where) for path in record.sample.images)
    row_prompt = asked.text.replace(IMAGE_MARKER, "").strip()
    return Question(record.sample.id, asked.text, row_prompt, pictures, record.kind, tuple(earlier))


def score_records(records: Sequence[Record], answers: AnswerFile, task: str, metric: str) -> TaskScore:
    pairs = answered(answers, records, [(record.sample.id,) for record in records], task)
    rule = METRICS[metric][0]
    graded = [
        Graded(
            record.sample.id,
            record.sample.images[0] if record.sample.images else f"id {record.sample.id}",
            rule(answer.text, record.expected),
            (record.kind,),
        )
        for record, answer in pairs
    ]
    settings = {"metric": metric} | answers.settings()
    return mean_score(task, graded, (KIND,), partly_right=metric == "vqa", settings=settings)


def read_records(file: Path, metric: str) -> list[Record]:
    found = read_json(file)
    if not isinstance(found, list) or not found:
        raise UserError(f"{file}: must be a JSON list with at least one record")
    records: dict[str, Record] = {}
    for number, value in enumerate(found):
        record = _record(value, number, file, metric)
        if record.sample.id in records:
            raise UserError(
                f"{record.where}: id {record.sample.id!r:.80} is there twice; answers need distinct ids"
            )
        records[record.sample.id] = record
    return list(records.values())


def _record(value: Any, number: int, file: Path, metric: str) -> Record:
    sample = parse_sample(value, str(file), 0, number)
    where = f"{file}: entry {number}"
    kind = value.get(KIND, _DEFAULT_KIND)
    if not isinstance(kind, str):
        raise UserError(f"{where}: `kind` must be a text, found {kind!r:.80}")
    _, described, is_valid = METRICS[metric]
    label = sample.turns[-1].text.strip()
    if not is_valid(label):
        raise UserError(
            f"{where}: for the metric {metric} the answer must be {described}, found {label!r:.80}"
        )
    people = value.get("answers")
    if people is None or metric != "vqa":
        return Record(sample, kind, (label,), where)
    if (
        not isinstance(people, list)
        or len(people) != PEOPLE
        or not all(isinstance(answer, str) for answer in people)
    ):
        raise UserError(f"{where}: `answers` must be {PEOPLE} texts, one of each person")
    return Record(sample, kind, tuple(people), where)
