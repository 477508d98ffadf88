"""MME: two yes/no questions about each image in 14 categories; perception is the paper's number."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from alignkd.errors import UserError
from alignkd.evaluate.answers import Answer, AnswerFile, Key, answered
from alignkd.evaluate.files import read_json_lines, read_text
from alignkd.evaluate.statistics import Array, ScoreOf, Units, estimate, ratio
from alignkd.evaluate.task_score import SCORE, Numbers, TaskScore, size_note
from alignkd.evaluate.tasks.layout import EVAL_ZIP, Layout, Needed
from alignkd.evaluate.tasks.pictures import picture_file
from alignkd.evaluate.tasks.task import (
    SHORT_ANSWER,
    SHORT_ANSWER_TOKENS,
    NothingToScore,
    Question,
    Task,
    image_question,
)

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)  # 200 each
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
CATEGORIES = PERCEPTION + COGNITION
PUBLISHED_QUESTIONS = 2_374
_YES_OR_NO = "Please answer yes or no."
_LABEL_FOLDER = "questions_answers_YN"  # of five categories; elsewhere the labels lie beside the images
_COLUMNS = 3  # of each category: right answers, images with both right, images

LAYOUT = Layout(
    "mme",
    ("MME", "mme"),
    (
        Needed("questions", ("llava_mme.jsonl",), EVAL_ZIP, for_scoring=False),
        Needed(
            "images",
            ("MME_Benchmark_release_version", "images"),
            "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation (by e-mail)",
            is_folder=True,
        ),
    ),
)


class _Label(NamedTuple):
    category: str
    image: str  # name of the file up to its first dot
    question: str  # as the benchmark's text file has it
    is_yes: bool


def questions(data: Path) -> list[Question]:
    images = LAYOUT.path(data, "images")
    return [
        image_question(
            row.published_id("question_id"),
            row.text("text"),
            picture_file(images, row.text("image"), row.where),
            row.text("category"),
        )
        for row in read_json_lines(LAYOUT.path(data, "questions"))
    ]


def yes_or_no(text: str) -> bool | None:
    """True for yes, False for no, None for anything else, which is wrong."""
    text = text.lower()
    if text in ("yes", "no"):
        return text == "yes"
    start = text[:4]
    if "yes" in start:
        return True
    return False if "no" in start else None


def score(data: Path, file: AnswerFile) -> TaskScore:
    labels = _labels(LAYOUT.path(data, "images"))
    known = {_key(label) for label in labels}
    _check_categories(data, {label.category for label in labels})
    keys = [_key(label) for label in labels]
    pairs = answered(file, labels, keys, "mme", lambda answer: _asked(answer, file.path, known))
    # Of a partial file, images with both answers only.
    times = Counter((label.category, label.image) for label, _ in pairs)
    pairs = [(label, answer) for label, answer in pairs if times[label.category, label.image] == 2]
    if not pairs:
        raise NothingToScore(f"{file.path}: no image has both of its answers; valid: a larger --limit")
    labels = [label for label, _ in pairs]
    right = {"\t".join(_key(label)): yes_or_no(answer.text) is label.is_yes for label, answer in pairs}
    present = [category for category in CATEGORIES if any(label.category == category for label in labels)]
    images = _images(labels, right, present)
    categories = {category: _category(images, category, present) for category in present}
    perception, cognition = _sum_of(PERCEPTION, present), _sum_of(COGNITION, present)
    notes = list(size_note(len(labels), PUBLISHED_QUESTIONS))
    if len(present) < len(CATEGORIES):
        absent = [category for category in CATEGORIES if category not in present]
        notes.append(f"the sums lack {', '.join(absent)}: the data have no such questions")
    return TaskScore(
        "mme",
        Numbers(len(labels), {SCORE: estimate(images, perception), "cognition": estimate(images, cognition)}),
        {"category": categories},
        images,
        perception,
        right,
        file.settings(),
        tuple(notes),
    )


def _check_categories(data: Path, present: set[str]) -> None:
    """Raises UserError when LLaVA's question file asks about a category that has no labels."""
    file = LAYOUT.find(data, "questions")
    if file is None:
        return
    asked = {row.text("category") for row in read_json_lines(file)}
    lost = sorted(asked.difference(present))
    if lost:
        raise UserError(
            f"{LAYOUT.path(data, 'images')}: no labels (CATEGORY/*.txt or CATEGORY/{_LABEL_FOLDER}/*.txt) "
            f"for {', '.join(lost)}, which {file} asks about"
        )


def _images(labels: list[_Label], right: dict[str, bool], present: list[str]) -> Units:
    pairs: dict[tuple[str, str], list[bool]] = {}
    for label in labels:
        pairs.setdefault((label.category, label.image), []).append(right["\t".join(_key(label))])
    rows = []
    for (category, image), results in pairs.items():
        counts = [0.0] * (_COLUMNS * len(present))
        start = _COLUMNS * present.index(category)
        counts[start : start + _COLUMNS] = float(sum(results)), float(all(results)), 1.0
        rows.append((f"{category}/{image}", counts))
    return Units.of(rows, stratum=lambda name: name.split("/")[0])


def _sum_of(categories: tuple[str, ...], present: list[str]) -> ScoreOf:
    """Of each category, accuracy and the share of images with both answers right, both in per cent."""
    starts = [_COLUMNS * present.index(category) for category in categories if category in present]

    def score_of(sums: Array) -> Array:
        total = 0.0 * sums[..., 0]
        for start in starts:
            right, both, images = sums[..., start], sums[..., start + 1], sums[..., start + 2]
            total = total + 100.0 * ratio(right, 2 * images) + 100.0 * ratio(both, images)
        return total

    return score_of


def _category(images: Units, category: str, present: list[str]) -> Numbers:
    members = [number for number, stratum in enumerate(images.strata) if stratum == category]
    own = Units(
        tuple(images.names[number] for number in members), images.counts[members], ("",) * len(members)
    )
    start = _COLUMNS * present.index(category)
    return Numbers(
        2 * len(members),
        {
            SCORE: estimate(own, _sum_of((category,), present)),
            "accuracy": estimate(own, lambda sums: 100.0 * ratio(sums[..., start], 2 * sums[..., start + 2])),
            "accuracy_plus": estimate(
                own, lambda sums: 100.0 * ratio(sums[..., start + 1], sums[..., start + 2])
            ),
        },
    )


def _key(label: _Label) -> Key:
    return (label.category, label.image, label.question)


def _asked(answer: Answer, path: Path, known: set[Key]) -> Key:
    """The label that an answer belongs to. LLaVA's prompts have another instruction than the labels; in
    seven questions of the labels two spaces stand before it."""
    category, _, image = answer.question_id.partition("/")
    image = image.rsplit("/", 1)[-1].split(".")[0]
    if not answer.prompt:
        raise UserError(
            f"{path}: line {answer.line}: has no `prompt`, which tells an image's two questions apart"
        )
    question = answer.prompt.replace(SHORT_ANSWER.strip(), "").strip()
    if _YES_OR_NO not in question:
        question = f"{question} {_YES_OR_NO}"
    one_space = (category, image, question)
    if one_space in known:
        return one_space
    return (category, image, question.replace(f" {_YES_OR_NO}", f"  {_YES_OR_NO}"))


def _labels(folder: Path) -> list[_Label]:
    labels = []
    for category in CATEGORIES:
        apart = folder / category / _LABEL_FOLDER
        files = sorted((apart if apart.is_dir() else folder / category).glob("*.txt"))
        labels += [label for file in files for label in _labels_of_image(file, category)]
    if not labels:
        raise UserError(
            f"{folder}: has no CATEGORY/*.txt with questions; categories: {', '.join(CATEGORIES)}"
        )
    return labels


def _labels_of_image(file: Path, category: str) -> list[_Label]:
    labels = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        question, _, answer = line.strip().partition("\t")
        if answer.strip() not in ("Yes", "No"):
            raise UserError(
                f"{file}: line {number}: must be a question, a tab and Yes or No, found {line!r:.160}"
            )
        labels.append(_Label(category, file.name.split(".")[0], question, answer.strip() == "Yes"))
    if len(labels) != 2:
        raise UserError(f"{file}: must hold two questions about its image, found {len(labels)}")
    repeated = [
        question for question, times in Counter(label.question for label in labels).items() if times > 1
    ]
    if repeated:
        raise UserError(f"{file}: asks {repeated[0]!r:.160} twice")
    return labels


TASK = Task("mme", "MME", LAYOUT, SHORT_ANSWER_TOKENS, questions, score, average_scale=1 / 20)
