"""Writes the sample task: images, LLaVA-style JSON files, a tokenizer, and folders of tiny models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from alignkd.data.sample_task import folders
from alignkd.data.sample_task.digits import DigitSet, Grid, draw_grid, load_digit_sets, to_image
from alignkd.data.sample_task.questions import caption, draw_kind, draw_question, images_of
from alignkd.data.sample_task.tokenizer import train_tokenizer
from alignkd.errors import UserError

MINIMUM_SAMPLES = 16
TRAIN_PER_TEST = 16  # training samples per test question ...
MINIMUM_TEST = 64  # ... but at least this many

Progress = Callable[[int, int], None]


def write_sample_data(out: Path, samples: int, seed: int, progress: Progress | None = None) -> None:
    """Write ``samples`` training samples, half captions and half questions, and a test set to ``out``.

    ``out`` will contain ``train_captions.json`` (for the `plain` template), ``train_questions.json`` and
    ``test.json`` (for `v1`; each test record has a ``kind``), ``images/``, and the model folders
    ``teacher/``, ``student/`` and ``tower/``. The same ``samples`` and ``seed`` give the same bytes.
    ``progress`` is called with (images written, all images). Raises UserError if the folder is not empty,
    if there are too few samples, or if scikit-learn is missing.
    """
    if samples < MINIMUM_SAMPLES:
        raise UserError(f"--samples {samples}: must be at least {MINIMUM_SAMPLES}")
    if seed < 0:
        raise UserError(f"--seed {seed}: must not be negative")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: not an empty folder; remove it or choose another one")
    train_digits, test_digits = load_digit_sets(seed)
    # The folder appears complete or not at all.
    partial = out.with_name(out.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    _write(partial, samples, seed, train_digits, test_digits, progress or (lambda done, total: None))
    partial.rename(out)


def _write(
    out: Path, samples: int, seed: int, train_digits: DigitSet, test_digits: DigitSet, progress: Progress
) -> None:
    questions = samples // 2
    tests = max(MINIMUM_TEST, samples // TRAIN_PER_TEST)
    total = samples - questions + tests
    (out / "images").mkdir(parents=True)
    train = _SplitWriter(out / "images", "train", train_digits, np.random.default_rng([seed, 2]))
    train.draw(samples - questions, lambda written: progress(written, total))
    test = _SplitWriter(out / "images", "test", test_digits, np.random.default_rng([seed, 3]))
    test.draw(tests, lambda written: progress(samples - questions + written, total))

    folders.write_json(out / "train_captions.json", train.captions())
    folders.write_json(out / "train_questions.json", train.questions(questions))
    folders.write_json(out / "test.json", test.questions(tests, with_kind=True))

    tokenizer = train_tokenizer()
    folders.write_model_folder(out / "teacher", folders.TEACHER_CONFIG, tokenizer)
    folders.write_model_folder(out / "student", folders.STUDENT_CONFIG, tokenizer)
    folders.write_tower_folder(out / folders.TOWER, seed)


class _SplitWriter:
    """Draws the images of a split, then texts about them."""

    def __init__(self, folder: Path, split: str, digits: DigitSet, random: np.random.Generator) -> None:
        self.folder, self.split, self.digits, self.random = folder, split, digits, random
        self.grids: list[Grid] = []

    def draw(self, count: int, step: Callable[[int], None]) -> None:
        for index in range(count):
            grid = draw_grid(self.digits, self.random)
            to_image(grid).save(self.folder / self._name(index), format="PNG")
            self.grids.append(grid)
            step(index + 1)

    def captions(self) -> list[dict[str, Any]]:
        return [
            {
                "id": f"{self.split}-caption-{index}",
                "image": self._name(index),
                "conversations": _turns("<image>", caption(grid)),
            }
            for index, grid in enumerate(self.grids)
        ]

    def questions(self, count: int, *, with_kind: bool = False) -> list[dict[str, Any]]:
        """One question per image, in order; a question about two images also shows the next one."""
        records = []
        for index in range(count):
            kind = draw_kind(self.random)
            shown = [(index + offset) % len(self.grids) for offset in range(images_of(kind))]
            question = draw_question(kind, [self.grids[number] for number in shown], self.random)
            names = [self._name(number) for number in shown]
            record: dict[str, Any] = {"id": f"{self.split}-question-{index}"}
            if with_kind:
                record["kind"] = kind
            if names:
                record["image"] = names[0] if len(names) == 1 else names
            text = "<image>\n" * len(names) + question.text
            record["conversations"] = _turns(text, question.answer)
            records.append(record)
        return records

    def _name(self, index: int) -> str:
        return f"{self.split}_{index:06d}.png"


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
