"""Batches of random samples: an image behind a ``v1`` system sentence, a question, an answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from alignkd.data.batch import IGNORE_INDEX, IMAGE_TOKEN_ID, Batch
from alignkd.data.collate import CollateSettings, Example, collate
from alignkd.data.micro_batches import split_by_samples, split_by_tokens
from benchmarks.models import VOCABULARY

VISION_TOKENS = 144
BEFORE_IMAGE = 36  # tokens of the system sentence
IMAGE_SHAPE = (3, 336, 336)


@dataclass(frozen=True)
class Shape:
    """The samples of an optimizer step, and how they are split where no token budget does it."""

    name: str
    lengths: tuple[int, ...]  # ascending, as the sampler sorts them
    accumulate: bool = False  # every sample is a micro-batch of its own

    @property
    def mixed(self) -> bool:
        return len(set(self.lengths)) > 1


def random_example(length: int, rng: np.random.Generator) -> Example:
    """``length`` embedding tokens; the second half of the text after the image is supervised."""
    after = length - BEFORE_IMAGE - VISION_TOKENS
    words = rng.integers(3, VOCABULARY, size=BEFORE_IMAGE + after).tolist()
    ids = [*words[:BEFORE_IMAGE], IMAGE_TOKEN_ID, *words[BEFORE_IMAGE:]]
    asked = len(ids) - after // 2
    labels = [IGNORE_INDEX] * asked + ids[asked:]
    image = torch.from_numpy(rng.standard_normal(IMAGE_SHAPE, dtype=np.float32))
    return Example(ids, labels, (image,))


def random_window(
    shape: Shape, packing: bool, token_budget: bool, device: torch.device, seed: int = 0
) -> list[Batch]:
    """The micro-batches of a step, the same samples whatever the layout. The budget is the longest sample's
    length."""
    rng = np.random.default_rng(seed)
    examples = [random_example(length, rng) for length in shape.lengths]
    if token_budget:
        parts = split_by_tokens(shape.lengths, max(shape.lengths), packing, 1)
    else:
        parts = split_by_samples(shape.lengths, 1 if shape.accumulate else len(examples), packing)
    settings = CollateSettings(VISION_TOKENS, IMAGE_SHAPE, packing=packing)
    return [collate([examples[sample] for sample in part], settings).to(device) for part in parts]
