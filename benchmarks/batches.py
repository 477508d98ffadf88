"""Batches of random samples: an image behind a ``v1`` system sentence, a question, an answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from alignkd.data.batch import IGNORE_INDEX, IMAGE_TOKEN_ID, Batch
from alignkd.data.collate import CollateSettings, Example, collate
from benchmarks.models import VOCABULARY

VISION_TOKENS = 144
BEFORE_IMAGE = 36  # tokens of the system sentence
IMAGE_SHAPE = (3, 336, 336)


def random_example(length: int, rng: np.random.Generator) -> Example:
    """``length`` embedding tokens; the second half of the text after the image is supervised."""
    after = length - BEFORE_IMAGE - VISION_TOKENS
    words = rng.integers(3, VOCABULARY, size=BEFORE_IMAGE + after).tolist()
    ids = [*words[:BEFORE_IMAGE], IMAGE_TOKEN_ID, *words[BEFORE_IMAGE:]]
    asked = len(ids) - after // 2
    labels = [IGNORE_INDEX] * asked + ids[asked:]
    image = torch.from_numpy(rng.standard_normal(IMAGE_SHAPE, dtype=np.float32))
    return Example("random", ids, labels, (image,))


@dataclass(frozen=True)
class Samples:
    """The same samples in both layouts."""

    padded: Batch  # a row each, filled up to the longest
    packed: Batch  # one row of all


def random_samples(lengths: list[int], device: torch.device, seed: int = 0) -> Samples:
    rng = np.random.default_rng(seed)
    examples = [random_example(length, rng) for length in lengths]
    settings = (CollateSettings(VISION_TOKENS, IMAGE_SHAPE, packing=packing) for packing in (False, True))
    return Samples(*(collate(examples, layout).to(device) for layout in settings))
