"""Collates encoded samples into one ``Batch``: expands images, pads or packs, and lists positions and counts.

The attention term selects text rows by the token itself, the logit term selects positions by the next token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from alignkd.data.batch import (
    IGNORE_INDEX,
    IMAGE_TOKEN_ID,
    NO_COLUMN,
    NO_ROW,
    PADDING_ID,
    Batch,
    ImagePlace,
    ImageSpan,
    TermCounts,
)
from alignkd.data.tower_inputs import joined_inputs

AttentionRows = Literal["all_text", "prompt_only"]
LogitPositions = Literal["supervised", "all_text"]
IntArray = np.ndarray[Any, np.dtype[np.int64]]
BoolArray = np.ndarray[Any, np.dtype[np.bool_]]

UNSUPERVISED_BOS_ID = 1  # the one token of a micro-batch without samples


@dataclass(frozen=True)
class Example:
    """An encoded sample of MobileVLM; ``ids`` has one IMAGE_TOKEN_ID per image."""

    ids: list[int]
    labels: list[int]  # not shifted, IGNORE_INDEX where unsupervised
    images: tuple[torch.Tensor, ...]  # float32 [3, H, W] each


@dataclass(frozen=True)
class ExpandedExample:
    """A sample as a family's processor encodes it: ``ids`` has every vision token of every image."""

    ids: list[int]
    labels: list[int]  # not shifted, IGNORE_INDEX where unsupervised
    columns: tuple[IntArray, ...]  # of each image's vision tokens, ascending
    is_text: BoolArray  # [tokens] False for vision tokens and what the processor puts around them
    # What the vision tower needs, all images one after the other; never empty (see ``Batch.pixel_values``).
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    # For a teacher that sees images on other grids: the sample as it sees it, and the (rows, columns) of each
    # image's vision tokens, which both have then.
    of_teacher: ExpandedExample | None = None
    grids: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class CollateSettings:
    vision_tokens: int  # V, embedding tokens per image; of an ExpandedExample each image has its own
    image_shape: tuple[int, int, int]  # [3, H, W]
    attention_rows: AttentionRows = "all_text"
    logit_positions: LogitPositions = "supervised"
    packing: bool = False  # concatenate all samples into one row instead of padding each
    top_k: int = 16  # K, focus tokens per image
    # What the vision tower gets when no sample has an image; empty: MobileVLM's zero image.
    dummy: Mapping[str, torch.Tensor] = field(default_factory=dict)
    teacher_dummy: Mapping[str, torch.Tensor] | None = None  # the same of a teacher with other grids


@dataclass(frozen=True)
class _Sample:
    ids: IntArray
    labels: IntArray
    is_text: BoolArray
    columns: Sequence[IntArray]  # of each image's vision tokens


def collate(
    examples: Sequence[Example | ExpandedExample], settings: CollateSettings, skipped: int = 0
) -> Batch:
    """Without examples the batch is one masked token, so that a rank without samples still runs.

    ``skipped``: the number of bad samples that were left out of this micro-batch.
    """
    samples = [_expand(example, settings.vision_tokens) for example in examples] or [_no_sample()]
    lengths_B = np.array([len(sample.ids) for sample in samples], dtype=np.int64)
    ids = [sample.ids for sample in samples]
    ids_BL = np.concatenate(ids)[None] if settings.packing else _padded(ids, PADDING_ID)
    # The first column of each sample: in the packed row, or in its own.
    starts_B = np.cumsum(lengths_B) - lengths_B if settings.packing else np.zeros_like(lengths_B)
    rows_B = np.zeros_like(starts_B) if settings.packing else np.arange(len(samples))

    places, text_rows = _images_and_rows(samples, settings)
    of_images = np.array([place.sample for place in places], dtype=np.int64)
    starts_I = np.array([place.start for place in places], dtype=np.int64) + starts_B[of_images]
    text_rows = [rows + starts_B[place.sample] for rows, place in zip(text_rows, places, strict=True)]
    positions_N, next_labels_N = _logit_positions(samples, rows_B * ids_BL.shape[1] + starts_B, settings)
    columns = [columns for sample in samples for columns in sample.columns]

    counts = TermCounts(
        supervised=int((next_labels_N != IGNORE_INDEX).sum()),
        logits=len(positions_N),
        attention_pairs=sum(place.rows * len(of) for place, of in zip(places, columns, strict=True)),
        vision_tokens=sum(map(len, columns)),
        focus_tokens=sum(
            min(settings.top_k, len(of)) for place, of in zip(places, columns, strict=True) if place.rows
        ),
        tokens=int(lengths_B.sum()) if examples else 0,
        samples=len(examples),
        skipped=skipped,
        slots=ids_BL.size if examples else 0,
    )
    bounds = np.append(starts_B, lengths_B.sum()).astype(np.int32)
    position_ids = np.concatenate([np.arange(length) for length in lengths_B])[None]
    return Batch(
        input_ids_BL=torch.from_numpy(ids_BL),
        image_count=len(places),
        image_samples=torch.from_numpy(rows_B[of_images]),
        image_starts=torch.from_numpy(starts_I),
        text_rows_IM=torch.from_numpy(_padded(text_rows, NO_ROW)),
        logit_positions_N=torch.from_numpy(positions_N),
        logit_labels_N=torch.from_numpy(next_labels_N),
        counts=counts,
        image_places=tuple(places),
        segments=tuple(lengths_B.tolist()) if settings.packing else (),
        position_ids_BL=torch.from_numpy(position_ids) if settings.packing else None,
        segment_bounds=torch.from_numpy(bounds) if settings.packing else None,
        **_image_tensors(examples, columns, settings),
        **_of_teacher(examples, settings),
    )


def _of_teacher(examples: Sequence[Example | ExpandedExample], settings: CollateSettings) -> dict[str, Any]:
    """The fields of ``Batch`` for a teacher with other grids."""
    if settings.teacher_dummy is None:
        return {}
    ours = [example for example in examples if isinstance(example, ExpandedExample)]
    theirs = [example.of_teacher for example in ours if example.of_teacher is not None]
    assert len(theirs) == len(examples), "one encoder made all of them"
    own = replace(settings, dummy=settings.teacher_dummy, teacher_dummy=None)
    return {
        "of_teacher": replace(collate(theirs, own), grids=_grids(theirs)),
        "grids": _grids(ours),
    }


def _grids(examples: Sequence[ExpandedExample]) -> tuple[tuple[int, int], ...]:
    return tuple(grid for example in examples for grid in example.grids)


def _expand(example: Example | ExpandedExample, vision_tokens: int) -> _Sample:
    """The sample with ``vision_tokens`` in the place of each image marker, if it still has markers."""
    ids, labels = np.array(example.ids, dtype=np.int64), np.array(example.labels, dtype=np.int64)
    if isinstance(example, ExpandedExample):
        return _Sample(ids, labels, example.is_text, example.columns)
    repeats = np.where(ids == IMAGE_TOKEN_ID, vision_tokens, 1)
    ids, labels = np.repeat(ids, repeats), np.repeat(labels, repeats)
    # Images may be adjacent: every V-th vision token starts one.
    places = np.flatnonzero(ids == IMAGE_TOKEN_ID).reshape(-1, vision_tokens)
    assert len(places) == len(example.images), "one image per marker"
    return _Sample(ids, labels, ids != IMAGE_TOKEN_ID, list(places))


def _no_sample() -> _Sample:
    ids = np.array([UNSUPERVISED_BOS_ID])
    return _Sample(ids, np.array([IGNORE_INDEX]), np.ones(1, dtype=np.bool_), [])


def _images_and_rows(
    samples: Sequence[_Sample], settings: CollateSettings
) -> tuple[list[ImagePlace], list[IntArray]]:
    """The place of each image, and the columns of its text rows, counted from the start of its sample."""
    places, rows = [], []
    for number, sample in enumerate(samples):
        is_row = sample.is_text
        if settings.attention_rows == "prompt_only":
            is_row = is_row & (sample.labels == IGNORE_INDEX)
        text = np.flatnonzero(is_row)
        for columns in sample.columns:
            after = text[text > columns[-1]]
            places.append(ImagePlace(number, int(columns[0]), len(after)))
            rows.append(after)
    return places, rows


def _image_tensors(
    examples: Sequence[Example | ExpandedExample],
    columns: Sequence[IntArray],
    settings: CollateSettings,
) -> dict[str, Any]:
    """The fields of ``Batch`` that differ between MobileVLM and the families of transformers."""
    if not settings.dummy:
        images = [image for example in examples if isinstance(example, Example) for image in example.images]
        return {"pixel_values": torch.stack(images) if images else torch.zeros(1, *settings.image_shape)}
    given = [
        example.inputs for example in examples if isinstance(example, ExpandedExample) and example.columns
    ]
    inputs = joined_inputs(given) if given else dict(settings.dummy)
    return {
        "pixel_values": inputs.pop("pixel_values"),
        "image_inputs": inputs,
        "columns_IV": torch.from_numpy(_padded(columns, NO_COLUMN)),
        "image_spans": tuple(ImageSpan(len(of), int(of[-1] - of[0]) + 1) for of in columns),
    }


def _padded(rows: Sequence[IntArray], filler: int) -> IntArray:
    """[rows, length of the longest], each row filled up on the right; [0, 0] without rows."""
    padded = np.full((len(rows), max(map(len, rows), default=0)), filler, dtype=np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded


def _logit_positions(
    samples: Sequence[_Sample], offsets_B: IntArray, settings: CollateSettings
) -> tuple[IntArray, IntArray]:
    """Flat positions whose next token is selected, and the label of that token. ``offsets_B``: flat
    position of each sample's first token. The last token of a sample has no next one, even if another
    sample follows."""
    positions, next_labels = [], []
    for sample, offset in zip(samples, offsets_B, strict=True):
        labels = sample.labels
        wanted = labels != IGNORE_INDEX if settings.logit_positions == "supervised" else sample.is_text
        columns = np.flatnonzero(wanted[1:])
        positions.append(columns + offset)
        next_labels.append(labels[columns + 1])
    return np.concatenate(positions), np.concatenate(next_labels)
