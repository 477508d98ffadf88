"""One collated micro-batch, and what of it every loss term counts.

Shapes: B samples, L longest expanded sequence, I images (real ones first, at least one), V vision tokens
of an image, M most text rows of an image, N logit positions.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

IGNORE_INDEX = -100  # labels that are not supervised
IMAGE_TOKEN_ID = -200  # stands V times where an image's vision tokens go
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

    def as_list(self) -> list[int]:
        return [getattr(self, field.name) for field in fields(self)]

    @classmethod
    def from_list(cls, values: list[int]) -> TermCounts:
        return cls(*values)

    def __add__(self, other: TermCounts) -> TermCounts:
        return TermCounts(*(a + b for a, b in zip(self.as_list(), other.as_list(), strict=True)))


@dataclass(frozen=True)
class Batch:
    input_ids_BL: torch.Tensor  # int64, IMAGE_TOKEN_ID at vision tokens, 0 at padding (right)
    labels_BL: torch.Tensor  # int64, not shifted, IGNORE_INDEX where unsupervised
    lengths_B: torch.Tensor  # int64, expanded lengths
    pixel_values: torch.Tensor  # float32 [I, 3, H, W]; a zero image when the batch has none
    image_count: int  # real images: the first of ``pixel_values``
    image_samples: torch.Tensor  # int64 [image_count], row of the batch
    image_starts: torch.Tensor  # int64 [image_count], column of the first vision token
    text_rows_IM: torch.Tensor  # int64 [image_count, M], columns of text tokens after the image, or NO_ROW
    logit_positions_N: torch.Tensor  # int64, b * L + t; label and divergence belong to token t + 1
    logit_labels_N: torch.Tensor  # int64, next token, IGNORE_INDEX where only the divergence applies
    counts: TermCounts
    sample_ids: tuple[str, ...]

    def to(self, device: torch.device | str) -> Batch:
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """Called by the loader when it is asked for pinned memory."""
        pinned: dict[str, Any] = {
            field.name: value.pin_memory()
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **pinned)
