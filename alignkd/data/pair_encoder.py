"""Samples for a teacher that sees images on other grids than the student: encoded by both processors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from alignkd.config.schema import DataSource
from alignkd.data.chat_encoder import ChatEncoder
from alignkd.data.collate import CollateSettings, ExpandedExample
from alignkd.data.records import BadSample, Sample
from alignkd.errors import UserError
from alignkd.text import listed


class PairEncoder:
    """The student's encoder, whose examples have those of the teacher's with them. Lengths are the
    student's."""

    def __init__(self, student: ChatEncoder, teacher: ChatEncoder) -> None:
        self._student = student
        self._teacher = teacher

    def fingerprint(self) -> dict[str, Any]:
        return self._student.fingerprint() | {"teacher": self._teacher.fingerprint()}

    def check(self, sample: Sample, source: DataSource) -> None:
        self._student.check(sample, source)

    def length(self, samples: Sequence[Sample], source: DataSource) -> list[int | BadSample]:
        return self._student.length(samples, source)

    def encode(self, sample: Sample, source: DataSource) -> ExpandedExample:
        """Raises UserError when the two do not see the same text, or an image is not one grid for both."""
        images = self._student.images(sample, source)
        ours, theirs = (
            with_grids(encoder.encode_images(sample, images, source), encoder.folder)
            for encoder in (self._student, self._teacher)
        )
        if _text(ours) != _text(theirs):
            raise UserError(
                f"{self._teacher.folder}: its processor encodes the text around an image differently from "
                "the student's"
            )
        return replace(ours, of_teacher=theirs)

    def collate_settings(self, **chosen: Any) -> CollateSettings:
        teacher = self._teacher.collate_settings()
        return replace(self._student.collate_settings(**chosen), teacher_dummy=teacher.dummy)


def with_grids(example: ExpandedExample, folder: object) -> ExpandedExample:
    """The example and the (rows, columns) of each image's vision tokens. Raises UserError, naming the model's
    ``folder``, unless every image is one rectangular grid of the whole image."""
    if not example.columns:
        return example
    counts = [len(columns) for columns in example.columns]
    sizes = example.inputs.get("image_grid_thw")
    if sizes is not None:  # in patches, several of which become one token
        grids = [_merged(size, count) for size, count in zip(sizes.tolist(), counts, strict=True)]
    else:
        pixels = example.inputs["pixel_values"]
        is_whole = pixels.dim() == 4 and len(pixels) == len(counts)  # no tiles
        grids = [(math.isqrt(count), math.isqrt(count)) if is_whole else (0, 0) for count in counts]
    if [math.prod(grid) for grid in grids] != counts:
        raise UserError(
            f"{folder}: the vision tokens of an image ({listed(counts)}) are not one rectangular grid of the "
            "whole image, so those of a teacher and a student with different numbers cannot be compared"
        )
    return replace(example, grids=tuple(grids))


def _merged(size: Sequence[int], count: int) -> tuple[int, int]:
    frames, rows, columns = size
    side = math.isqrt(frames * rows * columns // count)
    return rows // side, columns // side


def _text(example: ExpandedExample) -> tuple[list[int], list[int]]:
    """Ids and labels of the text."""
    ids, labels = np.array(example.ids), np.array(example.labels)
    return ids[example.is_text].tolist(), labels[example.is_text].tolist()
