"""Encoded samples -> one ``Batch``: images expanded, padded on the right, every position and count listed.

Rows of the attention term follow the token itself, positions of the logit term the token after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from alignkd.data.batch import IGNORE_INDEX, IMAGE_TOKEN_ID, NO_ROW, Batch, TermCounts

Rows = Literal["all_text", "prompt_only"]
Positions = Literal["supervised", "all_text"]
IntArray = np.ndarray[Any, np.dtype[np.int64]]

PADDING_ID = 0
UNSUPERVISED_BOS_ID = 1  # the one token of a micro-batch without samples


@dataclass(frozen=True)
class Example:
    """A sample ready to be collated: one IMAGE_TOKEN_ID in ``ids`` per image."""

    sample_id: str
    ids: list[int]
    labels: list[int]  # not shifted, IGNORE_INDEX where unsupervised
    images: tuple[torch.Tensor, ...]  # float32 [3, H, W] each


@dataclass(frozen=True)
class CollateSettings:
    vision_tokens: int  # V, embedding tokens of one image
    image_shape: tuple[int, int, int]  # [3, H, W]
    rows: Rows = "all_text"
    positions: Positions = "supervised"


def collate(examples: Sequence[Example], settings: CollateSettings, skipped: int = 0) -> Batch:
    """No example gives an all-masked batch of one token, so that a rank without samples runs all the same.

    ``skipped``: bad samples that were left out of this micro-batch; only counted.
    """
    expanded = [_expand(example, settings.vision_tokens) for example in examples]
    masked = np.array([UNSUPERVISED_BOS_ID]), np.array([IGNORE_INDEX])
    ids_BL, labels_BL, lengths_B = _pad(expanded or [masked])

    samples_I, starts_I, rows = _images_and_rows(expanded, settings)
    positions_N, next_labels_N = _logit_positions(ids_BL, labels_BL, lengths_B, settings.positions)
    images = [image for example in examples for image in example.images]
    assert len(images) == len(samples_I), "as many images as markers"

    counts = TermCounts(
        supervised=int((labels_BL[:, 1:] != IGNORE_INDEX).sum()),
        logits=len(positions_N),
        attention_rows=sum(len(columns) for columns in rows),
        images=len(images),
        focus_images=sum(len(columns) > 0 for columns in rows),
        tokens=int(lengths_B.sum()) if examples else 0,
        samples=len(examples),
        skipped=skipped,
    )
    return Batch(
        input_ids_BL=torch.from_numpy(ids_BL),
        labels_BL=torch.from_numpy(labels_BL),
        lengths_B=torch.from_numpy(lengths_B),
        pixel_values=torch.stack(images) if images else torch.zeros(1, *settings.image_shape),
        image_count=len(images),
        image_samples=torch.tensor(samples_I, dtype=torch.int64),
        image_starts=torch.tensor(starts_I, dtype=torch.int64),
        text_rows_IM=torch.from_numpy(_pad_rows(rows)),
        logit_positions_N=torch.from_numpy(positions_N),
        logit_labels_N=torch.from_numpy(next_labels_N),
        counts=counts,
        sample_ids=tuple(example.sample_id for example in examples),
    )


def _expand(example: Example, vision_tokens: int) -> tuple[IntArray, IntArray]:
    """ids and labels with every image marker repeated ``vision_tokens`` times."""
    ids = np.array(example.ids, dtype=np.int64)
    repeats = np.where(ids == IMAGE_TOKEN_ID, vision_tokens, 1)
    return np.repeat(ids, repeats), np.repeat(np.array(example.labels, dtype=np.int64), repeats)


def _pad(expanded: Sequence[tuple[IntArray, IntArray]]) -> tuple[IntArray, IntArray, IntArray]:
    lengths_B = np.array([len(ids) for ids, _ in expanded], dtype=np.int64)
    ids_BL = np.full((len(expanded), lengths_B.max()), PADDING_ID, dtype=np.int64)
    labels_BL = np.full_like(ids_BL, IGNORE_INDEX)
    for row, (ids, labels) in enumerate(expanded):
        ids_BL[row, : len(ids)] = ids
        labels_BL[row, : len(ids)] = labels
    return ids_BL, labels_BL, lengths_B


def _images_and_rows(
    expanded: Sequence[tuple[IntArray, IntArray]], settings: CollateSettings
) -> tuple[list[int], list[int], list[IntArray]]:
    """Per image: its row of the batch, its first column, and the columns of its text rows."""
    samples, starts, rows = [], [], []
    for sample, (ids, labels) in enumerate(expanded):
        is_row = ids != IMAGE_TOKEN_ID
        if settings.rows == "prompt_only":
            is_row &= labels == IGNORE_INDEX
        columns = np.flatnonzero(is_row)
        # Images may stand side by side: every V-th vision token begins one.
        for start in np.flatnonzero(ids == IMAGE_TOKEN_ID)[:: settings.vision_tokens]:
            samples.append(sample)
            starts.append(int(start))
            rows.append(columns[columns > start])
    return samples, starts, rows


def _pad_rows(rows: Sequence[IntArray]) -> IntArray:
    """[I, M], NO_ROW where an image has fewer than M rows; [0, 0] without images."""
    padded = np.full((len(rows), max(map(len, rows), default=0)), NO_ROW, dtype=np.int64)
    for image, columns in enumerate(rows):
        padded[image, : len(columns)] = columns
    return padded


def _logit_positions(
    ids_BL: IntArray, labels_BL: IntArray, lengths_B: IntArray, positions: Positions
) -> tuple[IntArray, IntArray]:
    """Flat positions b * L + t whose next token counts, and the next token's label."""
    if positions == "supervised":
        counts_BL = labels_BL != IGNORE_INDEX
    else:
        # Padding is known by length: its id is also that of <unk>.
        within_BL = np.arange(ids_BL.shape[1])[None] < lengths_B[:, None]
        counts_BL = within_BL & (ids_BL != IMAGE_TOKEN_ID)
    samples, columns = np.nonzero(counts_BL[:, 1:])
    return samples * ids_BL.shape[1] + columns, labels_BL[samples, columns + 1]
