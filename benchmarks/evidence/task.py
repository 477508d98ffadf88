"""The sample task in memory, with a validation split: no digit image is in two splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from alignkd.config.schema import DEFAULT_MAX_IMAGE_PIXELS
from alignkd.data.collate import Example
from alignkd.data.images import ImageProcessor
from alignkd.data.records import IMAGE_MARKER, Turn
from alignkd.data.sample_task import folders
from alignkd.data.sample_task.digits import DigitSet, Grid, draw_grid, load_digit_sets, to_image
from alignkd.data.sample_task.questions import (
    LARGEST_SUMMAND,
    TEXT_QUESTION,
    Question,
    caption,
    draw_kind,
    draw_question,
    images_of,
)
from alignkd.data.templates import TemplateName, encode
from alignkd.data.tokenizer import SentencePieceTokenizer

CAPTION = "caption"  # kind of the training samples that are no questions
QUESTION_KINDS = ("position", "column", "row", "count", "largest", "two_images", "text")
VALIDATION_PART = 0.2  # of the digit images that are not for the test
DATA_SEED = 0  # the data and the teacher are the same in all runs


@dataclass(frozen=True)
class Sizes:
    train: int = 16000  # samples, half captions and half questions, as in the demo
    validation: int = 80  # questions of each kind with an image; of sums there are 25 in all
    test: int = 300


@dataclass(frozen=True)
class Sample:
    kind: str
    example: Example  # ``images`` are empty: :attr:`grids` says which they are
    grids: tuple[int, ...]  # numbers of its images in the task


@dataclass(frozen=True)
class Splits:
    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    test: tuple[Sample, ...]


@dataclass(frozen=True)
class Task(Splits):
    pixels: torch.Tensor  # float32 [images, 3, H, W], normalised


def split_digits() -> tuple[DigitSet, DigitSet, DigitSet]:
    """Training, validation and test digits: the test digits of the product's own sample data, and a part of
    its training digits for validation, with the same share of every digit."""
    rest, test = load_digit_sets(DATA_SEED)
    random = np.random.default_rng([DATA_SEED, 10])
    held = np.zeros(len(rest.labels), dtype=bool)
    for digit in range(10):
        members = random.permutation(np.flatnonzero(rest.labels == digit))
        held[members[: round(len(members) * VALIDATION_PART)]] = True
    return (
        DigitSet(rest.pixels[~held], rest.labels[~held]),
        DigitSet(rest.pixels[held], rest.labels[held]),
        test,
    )


def build_task(tokenizer: SentencePieceTokenizer, sizes: Sizes) -> Task:
    """The same sizes give the same task."""
    train_digits, validation_digits, test_digits = split_digits()
    builder = _Builder(tokenizer)
    return Task(
        train=tuple(builder.training_samples(train_digits, sizes.train)),
        validation=tuple(builder.questions_of_each_kind(validation_digits, sizes.validation, 1)),
        test=tuple(builder.questions_of_each_kind(test_digits, sizes.test, 2)),
        pixels=builder.pixels(),
    )


def task_digest(task: Task) -> str:
    """First digits of the sha256 of all samples and pixels."""
    return splits_digest(task, task.pixels.numpy().tobytes())


def splits_digest(splits: Splits, images: bytes) -> str:
    """The same of samples and what describes their images."""
    found = hashlib.sha256()
    for samples in (splits.train, splits.validation, splits.test):
        rows = [(one.kind, one.example.ids, one.example.labels, one.grids) for one in samples]
        found.update(json.dumps(rows).encode())
    found.update(images)
    return found.hexdigest()[:12]


class _Builder:
    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        self._tokenizer = tokenizer
        self._grids: list[Grid] = []

    def training_samples(self, digits: DigitSet, count: int) -> list[Sample]:
        """As ``alignkd sample-data`` writes them: a caption and a question of each image."""
        random = np.random.default_rng([DATA_SEED, 20])
        first = self._draw(digits, count - count // 2, random)
        samples = [
            self._sample(CAPTION, "plain", IMAGE_MARKER, caption(self._grids[number]), (number,))
            for number in first
        ]
        for number in first[: count // 2]:
            kind = draw_kind(random)
            shown = tuple((number + offset) % len(first) for offset in range(images_of(kind)))
            samples.append(self._question(kind, shown, random))
        return samples

    def questions_of_each_kind(self, digits: DigitSet, count: int, split: int) -> list[Sample]:
        """``count`` questions of each kind, every one about images of its own, and all sums once."""
        random = np.random.default_rng([DATA_SEED, 20 + split])
        samples = []
        for kind in QUESTION_KINDS:
            if kind == "text":
                continue
            for _ in range(count):
                shown = tuple(self._draw(digits, images_of(kind), random))
                samples.append(self._question(kind, shown, random))
        numbers = range(LARGEST_SUMMAND + 1)
        for first, second in ((a, b) for a in numbers for b in numbers):
            text = TEXT_QUESTION.format(first=first, second=second)
            samples.append(self._asked(Question("text", text, str(first + second)), ()))
        return samples

    def pixels(self) -> torch.Tensor:
        processor = ImageProcessor(folders.PREPROCESSOR_CONFIG, DEFAULT_MAX_IMAGE_PIXELS)
        return torch.stack([processor.pixels(to_image(grid), "a grid", "pad") for grid in self._grids])

    def _draw(self, digits: DigitSet, count: int, random: np.random.Generator) -> range:
        start = len(self._grids)
        self._grids += [draw_grid(digits, random) for _ in range(count)]
        return range(start, start + count)

    def _question(self, kind: str, shown: Sequence[int], random: np.random.Generator) -> Sample:
        grids = [self._grids[number] for number in shown]
        return self._asked(draw_question(kind, grids, random), tuple(shown))

    def _asked(self, question: Question, shown: tuple[int, ...]) -> Sample:
        text = f"{IMAGE_MARKER}\n" * len(shown) + question.text
        return self._sample(question.kind, "v1", text, question.answer, shown)

    def _sample(
        self, kind: str, template: TemplateName, asked: str, answer: str, shown: tuple[int, ...]
    ) -> Sample:
        return encoded_sample(self._tokenizer, kind, template, asked, answer, shown)


def encoded_sample(
    tokenizer: SentencePieceTokenizer,
    kind: str,
    template: TemplateName,
    asked: str,
    answer: str,
    shown: tuple[int, ...],
) -> Sample:
    encoded = encode((Turn("human", asked), Turn("gpt", answer)), template, tokenizer)
    return Sample(kind, Example(encoded.ids, encoded.labels, ()), shown)
