"""One collated micro-batch, and the counts that normalise each loss term.

There are two layouts. **Padded**: each sample is a row; the B rows are padded on the right to the longest
length L. **Packed**: all samples are concatenated into a single row (B = 1, L is the sum of their lengths);
position ids restart at 0 for each sample, and ``segments`` holds their lengths. In both layouts columns are
counted from the start of the row.

Shapes: B rows, L columns, I images (real ones first, at least one), V vision tokens per image, M text rows of
the image that has most, N logit positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch

IGNORE_INDEX = -100  # label of an unsupervised token
IMAGE_TOKEN_ID = -200  # V of them mark the place of an image's vision tokens
PADDING_ID = 0
NO_ROW = -1  # padding of ``text_rows_IM``
NO_COLUMN = -1  # padding of ``columns_IV``


@dataclass(frozen=True)
class TermCounts:
    """Counts that do not depend on the model; they are summed over micro-batches and ranks."""

    supervised: int = 0  # positions of L_Sup
    logits: int = 0  # positions of the logit divergence
    attention_pairs: int = 0  # pairs of a vision token and a text row after its image
    vision_tokens: int = 0
    focus_tokens: int = 0  # K per image with text rows, or all of its vision tokens if it has fewer
    tokens: int = 0  # tokens without padding, vision tokens included
    samples: int = 0
    skipped: int = 0  # bad samples that were skipped (data.on_bad_sample: skip)
    slots: int = 0  # positions computed, padding included

    def as_list(self) -> list[int]:
        return [getattr(self, one.name) for one in fields(self)]

    @classmethod
    def from_list(cls, values: list[int]) -> TermCounts:
        return cls(*values)

    def __add__(self, other: TermCounts) -> TermCounts:
        return TermCounts(*(a + b for a, b in zip(self.as_list(), other.as_list(), strict=True)))


class ImageSpan(NamedTuple):
    """Extent of an image whose vision tokens need not be consecutive, on the host."""

    tokens: int  # vision tokens of this image
    columns: int  # from its first vision token to its last, both included


class ImagePlace(NamedTuple):
    """Position of an image and its text rows, on the host: loops over images must not wait for the device."""

    sample: int  # row of a padded batch, segment of a packed one
    start: int  # first vision token, counted from the start of its sample
    rows: int  # number of the image's ``text_rows_IM`` that are not NO_ROW


@dataclass(frozen=True)
class Batch:
    input_ids_BL: torch.Tensor  # int64, the family's image token at vision tokens, PADDING_ID as padding
    # MobileVLM: float32 [I, 3, H, W], a zero image if the batch has none; other families: what their
    # processor makes of the batch's images, one after the other (a blank one if it has none)
    pixel_values: torch.Tensor
    image_count: int  # real images
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
    # Images of other families than MobileVLM, which differ in their number of vision tokens:
    columns_IV: torch.Tensor | None = None  # int64, within the sample; NO_COLUMN fills up images with fewer
    image_spans: tuple[ImageSpan, ...] = ()  # one per real image
    image_inputs: dict[str, torch.Tensor] = field(default_factory=dict)  # of the tower, beside pixel_values
    # From a cache of the teacher: hidden states in its dtype, or instead its K most likely tokens, int32, and
    # their log-probabilities, fp16, the last of which is that of all other tokens together (R = K + 1).
    teacher_hidden_ND: torch.Tensor | None = None
    teacher_tokens_NK: torch.Tensor | None = None
    teacher_log_probs_NR: torch.Tensor | None = None
    # Of a teacher that sees images on other grids: the same samples, images and text, with its own numbers of
    # vision tokens and its own pixels. Both batches then have the (rows, columns) of each real image.
    of_teacher: Batch | None = None
    grids: tuple[tuple[int, int], ...] = ()

    @property
    def sample_count(self) -> int:
        """Samples in either layout; 1 for the masked row of a batch without samples."""
        return len(self.segments) or len(self.input_ids_BL)

    def to(self, device: torch.device | str) -> Batch:
        """A copy with every tensor on ``device``."""
        return self._mapped(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Called by the loader if it was created with ``pin_memory``."""
        return self._mapped(lambda value: value.pin_memory())

    def _mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        changed: dict[str, Any] = {
            one.name: change(value)
            for one in fields(self)
            if isinstance(value := getattr(self, one.name), torch.Tensor)
        }
        if self.of_teacher is not None:
            changed["of_teacher"] = self.of_teacher._mapped(change)
        changed["image_inputs"] = {name: change(value) for name, value in self.image_inputs.items()}
        return replace(self, **changed)
