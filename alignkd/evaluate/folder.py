"""Answers every question of a LLaVA-style file with the model in a folder, and scores the answers."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from alignkd.config.schema import DEFAULT_MAX_IMAGE_PIXELS
from alignkd.data.batch import IGNORE_INDEX, IMAGE_TOKEN_ID
from alignkd.data.collate import CollateSettings, Example, collate
from alignkd.data.images import AspectRatio, BadImage, ImageProcessor
from alignkd.data.records import Sample, parse_sample
from alignkd.data.templates import encode_prompt
from alignkd.data.tokenizer import SentencePieceTokenizer
from alignkd.errors import UserError, raise_if_passing
from alignkd.evaluate.accuracy import Accuracy, score
from alignkd.evaluate.decoding import greedy_decode
from alignkd.models.building import BuildOptions
from alignkd.models.families.mobilevlm_loading import load_model

DEFAULT_KIND = "question"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Question:
    """``ids``: the prompt, with one IMAGE_TOKEN_ID per image; ``answer``: the expected one."""

    sample: Sample
    kind: str
    ids: list[int]
    answer: str

    def length(self, vision_tokens: int) -> int:
        """The length of the prompt in embedding tokens."""
        return len(self.ids) + self.ids.count(IMAGE_TOKEN_ID) * (vision_tokens - 1)


def evaluate_folder(
    model_folder: Path,
    data: Path,
    image_folder: Path | None,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    progress: Progress | None = None,
) -> Accuracy:
    """Accuracy by greedy generation in fp32 on the CPU, with the `v1` template.

    ``data``: records whose last turn is the expected answer, grouped by an optional ``kind``. ``progress`` is
    called with (questions answered, all questions). Raises UserError for an unusable file or image.
    """
    tokenizer = SentencePieceTokenizer.from_folder(model_folder)
    questions = read_questions(data, tokenizer)
    if image_folder is None and any(question.sample.images for question in questions):
        raise UserError(f"{data}: contains images; give their folder with --image-folder")
    model = load_model(model_folder, BuildOptions(torch.float32)).eval()
    processor = ImageProcessor(model.config.preprocessor_config, DEFAULT_MAX_IMAGE_PIXELS)
    aspect_ratio = cast(AspectRatio, model.config.image_aspect_ratio)
    settings = CollateSettings(model.config.vision_tokens, processor.shape)
    answers: dict[int, str] = {}
    for numbers in _batches_of_equal_length(questions, model.config.vision_tokens, batch_size):
        examples = [
            _example(questions[number], processor, data, image_folder, aspect_ratio) for number in numbers
        ]
        generated = greedy_decode(model, collate(examples, settings), tokenizer.eos_id, max_new_tokens)
        answers.update(
            (number, tokenizer.decode(ids)) for number, ids in zip(numbers, generated, strict=True)
        )
        if progress is not None:
            progress(len(answers), len(questions))
    return score(
        [question.kind for question in questions],
        [question.answer for question in questions],
        [answers[number] for number in range(len(questions))],
    )


def read_questions(data: Path, tokenizer: SentencePieceTokenizer) -> list[Question]:
    """Check every record of a LLaVA-style file, and encode its prompt."""
    try:
        records = json.loads(data.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise_if_passing(error, data)
        raise UserError(f"{data}: cannot be read as JSON ({error})") from None
    if not isinstance(records, list) or not records:
        raise UserError(f"{data}: must be a JSON list with at least one record")
    return [_question(record, number, data, tokenizer) for number, record in enumerate(records)]


def _question(record: Any, number: int, data: Path, tokenizer: SentencePieceTokenizer) -> Question:
    sample = parse_sample(record, str(data), 0, number)
    kind = record.get("kind", DEFAULT_KIND)
    if not isinstance(kind, str):
        raise UserError(f"{data}: record {number}: `kind` must be text, found {kind!r:.80}")
    *asked, answer = sample.turns
    return Question(sample, kind, encode_prompt(asked, "v1", tokenizer), answer.text)


def _batches_of_equal_length(
    questions: list[Question], vision_tokens: int, batch_size: int
) -> list[list[int]]:
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, question in enumerate(questions):
        by_length[question.length(vision_tokens)].append(number)
    return [
        numbers[start : start + batch_size]
        for numbers in by_length.values()
        for start in range(0, len(numbers), batch_size)
    ]


def _example(
    question: Question,
    processor: ImageProcessor,
    data: Path,
    image_folder: Path | None,
    aspect_ratio: AspectRatio,
) -> Example:
    try:
        images = tuple(
            processor.read(image_folder or data.parent, path, aspect_ratio) for path in question.sample.images
        )
    except BadImage as error:
        raise UserError(f"{data}: record {question.sample.id!r:.80}: {error}") from None
    unsupervised = [IGNORE_INDEX] * len(question.ids)
    return Example(question.ids, unsupervised, images)
