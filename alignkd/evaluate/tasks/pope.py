"""POPE: is an object in the picture? Three splits; the paper's number is the mean of their F1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alignkd.errors import UserError
from alignkd.evaluate.answers import AnswerFile, answered, check_prompts
from alignkd.evaluate.files import Row, read_json_lines
from alignkd.evaluate.statistics import Array, Units, estimate, ratio
from alignkd.evaluate.task_score import SCORE, Numbers, TaskScore, size_note
from alignkd.evaluate.tasks.layout import EVAL_ZIP, Layout, Needed
from alignkd.evaluate.tasks.pictures import picture_file
from alignkd.evaluate.tasks.task import (
    SHORT_ANSWER,
    SHORT_ANSWER_TOKENS,
    Question,
    Task,
    image_question,
)

# Split -> what LLaVA's question file adds to the ids of its label file.
SPLITS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
PUBLISHED_QUESTIONS = 8_910
LABELS_COMMIT = "e3e39262c85a6a83f26cf5094022a782cb0df58d"
_LABELS = f"https://github.com/AoiDragon/POPE/tree/{LABELS_COMMIT}/output/coco"

LAYOUT = Layout(
    "pope",
    ("pope",),
    (
        Needed("questions", ("llava_pope_test.jsonl",), EVAL_ZIP),
        *(
            Needed(split, (f"coco/coco_pope_{split}.json", f"coco_pope_{split}.json"), _LABELS)
            for split in SPLITS
        ),
        Needed(
            "images",
            ("val2014",),
            "http://images.cocodataset.org/zips/val2014.zip",
            for_scoring=False,
            is_folder=True,
        ),
    ),
)


class _Asked(NamedTuple):
    question_id: int
    image: str
    text: str  # with the instruction
    split: str
    where: str


class _Graded(NamedTuple):
    asked: _Asked
    says_yes: bool
    is_yes: bool

    def counts(self) -> tuple[float, float, float, float]:
        """True positives, false positives, true negatives, false negatives; positive is yes."""
        return (
            float(self.says_yes and self.is_yes),
            float(self.says_yes and not self.is_yes),
            float(not self.says_yes and not self.is_yes),
            float(not self.says_yes and self.is_yes),
        )


def questions(data: Path) -> list[Question]:
    images = LAYOUT.path(data, "images")
    return [
        image_question(
            asked.question_id, asked.text, picture_file(images, asked.image, asked.where), asked.split
        )
        for asked in _asked(LAYOUT.path(data, "questions"))
    ]


def says_yes(text: str) -> bool:
    """Everything is a yes that has no `No`, `no` or `not` among the words of its first sentence."""
    words = text.split(".", maxsplit=1)[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def score(data: Path, file: AnswerFile) -> TaskScore:
    asked = _asked(LAYOUT.path(data, "questions"))
    pairs = answered(file, asked, [(str(question.question_id),) for question in asked], "pope")
    asked = [question for question, _ in pairs]
    texts = [question.text.removesuffix(SHORT_ANSWER) for question in asked]
    answers = [answer for _, answer in pairs]
    check_prompts(file, list(zip(answers, texts, strict=True)), "pope")
    present = [split for split in SPLITS if any(question.split == split for question in asked)]
    labels = {split: _labels(LAYOUT.path(data, split)) for split in present}
    graded = [
        _Graded(question, says_yes(answer.text), _is_yes(question, text, labels[question.split]))
        for question, answer, text in zip(asked, answers, texts, strict=True)
    ]
    units = Units.of((question.asked.image, _of_split(question, present)) for question in graded)
    by_split = {
        split: _numbers([question for question in graded if question.asked.split == split])
        for split in present
    }
    overall = {SCORE: estimate(units, mean_f1)} | _numbers(graded).estimates
    notes = list(size_note(len(graded), PUBLISHED_QUESTIONS))
    if len(present) < len(SPLITS):
        notes.append(f"the mean F1 is over {', '.join(present)} only: no question is of another split")
    return TaskScore(
        "pope",
        Numbers(len(graded), {name: overall[name] for name in (SCORE, "accuracy", "yes_ratio")}),
        {"split": by_split},
        units,
        mean_f1,
        {str(question.asked.question_id): question.says_yes == question.is_yes for question in graded},
        file.settings(),
        tuple(notes),
    )


def mean_f1(sums: Array) -> Array:
    """[..., 4 counts of each split] -> mean over the splits, in per cent [...]."""
    splits = sums.reshape(*sums.shape[:-1], -1, 4)
    return np.asarray(_f1(splits).mean(axis=-1))


def _f1(counts: Array) -> Array:
    """0 where nothing is and nobody says yes: the original divides by zero."""
    true_yes, false_yes, _, false_no = np.moveaxis(counts, -1, 0)
    return 100.0 * ratio(2 * true_yes, 2 * true_yes + false_yes + false_no)


def _accuracy(counts: Array) -> Array:
    return 100.0 * ratio(counts[..., 0] + counts[..., 2], counts.sum(axis=-1))


def _precision(counts: Array) -> Array:
    return 100.0 * ratio(counts[..., 0], counts[..., 0] + counts[..., 1])


def _recall(counts: Array) -> Array:
    return 100.0 * ratio(counts[..., 0], counts[..., 0] + counts[..., 3])


def _yes_ratio(counts: Array) -> Array:
    return 100.0 * ratio(counts[..., 0] + counts[..., 1], counts.sum(axis=-1))


def _numbers(graded: Sequence[_Graded]) -> Numbers:
    units = Units.of((question.asked.image, question.counts()) for question in graded)
    rules = {
        "f1": _f1,
        "accuracy": _accuracy,
        "precision": _precision,
        "recall": _recall,
        "yes_ratio": _yes_ratio,
    }
    return Numbers(len(graded), {name: estimate(units, rule) for name, rule in rules.items()})


def _of_split(question: _Graded, splits: Sequence[str]) -> list[float]:
    counts = [0.0] * (4 * len(splits))
    start = 4 * splits.index(question.asked.split)
    counts[start : start + 4] = question.counts()
    return counts


def _asked(path: Path) -> list[_Asked]:
    found = []
    for row in read_json_lines(path):
        question_id, split = row.id("question_id"), row.text("category")
        if split not in SPLITS:
            raise UserError(
                f"{row.where}: `category` must be one of {', '.join(SPLITS)}, found {split!r:.80}"
            )
        if not question_id.isdecimal():
            raise UserError(f"{row.where}: `question_id` must be a whole number, found {question_id!r:.80}")
        found.append(_Asked(int(question_id), row.text("image"), row.text("text"), split, row.where))
    return found


def _labels(path: Path) -> dict[str, Row]:
    return {row.id("question_id"): row for row in read_json_lines(path)}


def _is_yes(question: _Asked, text: str, labels: dict[str, Row]) -> bool:
    """Joined by id and compared by text: other releases of the labels have the same ids."""
    label = labels.get(str(question.question_id - SPLITS[question.split]))
    if label is None or label.text("text").strip() != text.strip() or label.text("image") != question.image:
        found = (
            "no such id"
            if label is None
            else f"{label.text('text')!r:.120} about {label.text('image')!r:.80}"
        )
        raise UserError(
            f"{question.where}: {text!r:.120} about {question.image!r:.80} does not agree with the labels "
            f"of the {question.split} split ({found}); the labels must be those of {_LABELS}, "
            "later ones are to other questions"
        )
    answer = label.text("label")
    if answer not in ("yes", "no"):
        raise UserError(f"{label.where}: `label` must be yes or no, found {answer!r:.80}")
    return answer == "yes"


TASK = Task("pope", "POPE", LAYOUT, SHORT_ANSWER_TOKENS, questions, score)
