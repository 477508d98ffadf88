"""Collates encoded samples into one ``Batch``: expands images, pads or packs, and lists positions and counts.

The attention term selects text rows by the token itself, the logit term selects positions by the next token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from alignkd.data.batch import (
    IGNORE_INDEX,
    IMAGE_TOKEN_ID,
    NO_ROW,
    PADDING_ID,
    Batch,
    ImagePlace,
    TermCounts,
)

AttentionRows = Literal["all_text", "prompt_only"]
LogitPositions = Literal["supervised", "all_text"]
IntArray = np.ndarray[Any, np.dtype[np.int64]]

UNSUPERVISED_BOS_ID = 1  # the one token of a micro-batch without samples


@dataclass(frozen=True)
class Example:
    """An encoded sample; ``ids`` has one IMAGE_TOKEN_ID per image."""

    ids: list[int]
    labels: list[int]  # not shifted, IGNORE_INDEX where unsupervised
    images: tuple[torch.Tensor, ...]  # float32 [3, H, W] each


@dataclass(frozen=True)
class CollateSettings:
    vision_tokens: int  # V, embedding tokens per image
    image_shape: tuple[int, int, int]  # [3, H, W]
    attention_rows: AttentionRows = "all_text"
    logit_positions: LogitPositions = "supervised"
    packing: bool = False  # concatenate all samples into one row instead of padding each


def collate(examples: Sequence[Example], settings: CollateSettings, skipped: int = 0) -> Batch:
    """Without examples the batch is one masked token, so that a rank without samples still runs.

    ``skipped``: the number of bad samples that were left out of this micro-batch.
    """
    expanded = [_expand(example, settings.vision_tokens) for example in examples]
    samples = expanded or [(np.array([UNSUPERVISED_BOS_ID]), np.array([IGNORE_INDEX]))]
    lengths_B = np.array([len(ids) for ids, _ in samples], dtype=np.int64)
    ids = [ids for ids, _ in samples]
    ids_BL = np.concatenate(ids)[None] if settings.packing else _padded(ids, PADDING_ID)
    # The first column of each sample: in the packed row, or in its own.
    starts_B = np.cumsum(lengths_B) - lengths_B if settings.packing else np.zeros_like(lengths_B)
    rows_B = np.zeros_like(starts_B) if settings.packing else np.arange(len(samples))

    places, text_rows = _images_and_rows(expanded, settings)
    of_images = np.array([place.sample for place in places], dtype=np.int64)
    starts_I = np.array([place.start for place in places], dtype=np.int64) + starts_B[of_images]
    text_rows = [rows + starts_B[place.sample] for rows, place in zip(text_rows, places, strict=True)]
    positions_N, next_labels_N = _logit_positions(samples, rows_B * ids_BL.shape[1] + starts_B, settings)
    images = [image for example in examples for image in example.images]
    assert len(images) == len(places), "one image per marker"

    counts = TermCounts(
        supervised=int((next_labels_N != IGNORE_INDEX).sum()),
        logits=len(positions_N),
        attention_rows=sum(place.rows for place in places),
        images=len(images),
        focus_images=sum(place.rows > 0 for place in places),
        tokens=int(lengths_B.sum()) if examples else 0,
        samples=len(examples),
        skipped=skipped,
        slots=ids_BL.size if examples else 0,
    )
    bounds = np.append(starts_B, lengths_B.sum()).astype(np.int32)
    position_ids = np.concatenate([np.arange(length) for length in lengths_B])[None]
    return Batch(
        input_ids_BL=torch.from_numpy(ids_BL),
        pixel_values=torch.stack(images) if images else torch.zeros(1, *settings.image_shape),
        image_count=len(images),
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
    )


def _expand(example: Example, vision_tokens: int) -> tuple[IntArray, IntArray]:
    """ids and labels, with each image marker repeated ``vision_tokens`` times."""
    ids = np.array(example.ids, dtype=np.int64)
    repeats = np.where(ids == IMAGE_TOKEN_ID, vision_tokens, 1)
    return np.repeat(ids, repeats), np.repeat(np.array(example.labels, dtype=np.int64), repeats)


def _images_and_rows(
    expanded: Sequence[tuple[IntArray, IntArray]], settings: CollateSettings
) -> tuple[list[ImagePlace], list[IntArray]]:
    """The place of each image, and the columns of its text rows, counted from the start of its sample."""
    places, rows = [], []
    for sample, (ids, labels) in enumerate(expanded):
        is_row = ids != IMAGE_TOKEN_ID
        if settings.attention_rows == "prompt_only":
            is_row &= labels == IGNORE_INDEX
        columns = np.flatnonzero(is_row)
        # Images may be adjacent: every V-th vision token starts one.
        for start in np.flatnonzero(ids == IMAGE_TOKEN_ID)[:: settings.vision_tokens]:
            after = columns[columns > start]
            places.append(ImagePlace(sample, int(start), len(after)))
            rows.append(after)
    return places, rows


def _padded(rows: Sequence[IntArray], filler: int) -> IntArray:
    """[rows, length of the longest], each row filled up on the right; [0, 0] without rows."""
    padded = np.full((len(rows), max(map(len, rows), default=0)), filler, dtype=np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded


def _logit_positions(
    samples: Sequence[tuple[IntArray, IntArray]], offsets_B: IntArray, settings: CollateSettings
) -> tuple[IntArray, IntArray]:
    """Flat positions whose next token is selected, and the label of that token. ``offsets_B``: flat
    position of each sample's first token. The last token of a sample has no next one, even if another
    sample follows."""
    positions, next_labels = [], []
    for (ids, labels), offset in zip(samples, offsets_B, strict=True):
        wanted = labels != IGNORE_INDEX if settings.logit_positions == "supervised" else ids != IMAGE_TOKEN_ID
        columns = np.flatnonzero(wanted[1:])
        positions.append(columns + offset)
        next_labels.append(labels[columns + 1])
    return np.concatenate(positions), np.concatenate(next_labels)
