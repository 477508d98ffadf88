"""One collated micro-batch, and what of it every loss term counts.

Two layouts. **Padded**: a sample is a row, B rows filled up on the right to the longest, L. **Packed**: all
samples stand one after another in the only row (B = 1, L = their sum), positions start again at 0 for each,
and ``segments`` has their lengths. A column counts from the left of its row in both.

Shapes: B rows, L columns, I images (real ones first, at least one), V vision tokens of an image, M most text
rows of an image, N logit positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch

IGNORE_INDEX = -100  # labels that are not supervised
IMAGE_TOKEN_ID = -200  # stands V times where an image's vision tokens go
PADDING_ID = 0
NO_ROW = -1  # fills ``text_rows_IM`` up


@dataclass(frozen=True)
class TermCounts:
    """Model-independent counts; they add up over micro-batches and ranks."""

    supervised: int = 0  # positions of L_Sup
    logits: int = 0  # positions of the logit divergence
    attention_rows: int = 0  # valid (image, text row) pairs
    images: int = 0
    focus_images: int = 0  # images with at least one text row after them
    tokens: int = 0  # non-padding tokens, vision tokens included
    samples: int = 0
    skipped: int = 0  # bad samples left out (data.on_bad_sample: skip)
    slots: int = 0  # positions computed, padding included

    def as_list(self) -> list[int]:
        return [getattr(self, field.name) for field in fields(self)]

    @classmethod
    def from_list(cls, values: list[int]) -> TermCounts:
        return cls(*values)

    def __add__(self, other: TermCounts) -> TermCounts:
        return TermCounts(*(a + b for a, b in zip(self.as_list(), other.as_list(), strict=True)))


class ImagePlace(NamedTuple):
    """Where an image and its text rows are, for the host: loops over images must not wait for the device."""

    sample: int  # row of a padded batch, segment of a packed one
    start: int  # first vision token, counted from the beginning of its sample
    rows: int  # how many of the image's ``text_rows_IM`` are no NO_ROW


@dataclass(frozen=True)
class Batch:
    input_ids_BL: torch.Tensor  # int64, IMAGE_TOKEN_ID at vision tokens, PADDING_ID on the right
    pixel_values: torch.Tensor  # float32 [I, 3, H, W]; a zero image when the batch has none
    image_count: int  # real images: the first of ``pixel_values``
    image_samples: torch.Tensor  # int64 [image_count], row of the batch
    image_starts: torch.Tensor  # int64 [image_count], column of the first vision token
    text_rows_IM: torch.Tensor  # int64 [image_count, M], columns of text tokens after the image, or NO_ROW
    logit_positions_N: torch.Tensor  # int64, row * L + column t; label and divergence belong to token t + 1
    logit_labels_N: torch.Tensor  # int64, next token, IGNORE_INDEX where only the divergence applies
    counts: TermCounts
    image_places: tuple[ImagePlace, ...] = ()  # one per real image
    segments: tuple[int, ...] = ()  # packed: length of every sample; padded: empty
    # packed: int64, from 0 in every segment; padded: None
    position_ids_BL: torch.Tensor | None = None
    # packed: int32 [segments + 1], columns at which segments begin, and the end (cu_seqlens); padded: None
    segment_bounds: torch.Tensor | None = None

    @property
    def sample_count(self) -> int:
        """Samples in either layout; 1 for the masked row of a batch without samples."""
        return len(self.segments) or len(self.input_ids_BL)

    def to(self, device: torch.device | str) -> Batch:
        """A copy with every tensor on ``device``."""
        return self._mapped(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Called by the loader when it is asked for pinned memory."""
        return self._mapped(lambda value: value.pin_memory())

    def _mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        changed: dict[str, Any] = {
            field.name: change(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **changed)
