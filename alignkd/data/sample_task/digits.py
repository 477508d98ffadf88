"""Handwritten digits (scikit-learn's copy of the UCI data set), split by image, and 2 x 2 grids of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from alignkd.errors import UserError

DIGIT_SIDE = 8  # pixels of a digit in the set
SCALE = 2  # every pixel becomes SCALE x SCALE pixels
IMAGE_SIDE = 2 * DIGIT_SIDE * SCALE
TEST_PART = 0.25

GridPixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class DigitSet:
    """Digit images: ``pixels`` uint8 [N, 8, 8], 0 to 255, and their ``labels`` [N], 0 to 9."""

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Grid:
    """Four digits in reading order: top left, top right, bottom left, bottom right."""

    digits: tuple[int, int, int, int]
    pixels: GridPixels  # uint8 [IMAGE_SIDE, IMAGE_SIDE]


def load_digit_sets(seed: int) -> tuple[DigitSet, DigitSet]:
    """Training and test digits: disjoint sets of images, with the same share of every digit."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "the sample task needs the digits of scikit-learn: pip install 'alignkd[sample]'"
        ) from error
    data = load_digits()
    pixels = np.round(data.images / 16.0 * 255.0).astype(np.uint8)
    labels = data.target.astype(np.int64)
    random = np.random.default_rng([seed, 0])
    is_test = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        members = random.permutation(np.flatnonzero(labels == digit))
        is_test[members[: round(len(members) * TEST_PART)]] = True
    return DigitSet(pixels[~is_test], labels[~is_test]), DigitSet(pixels[is_test], labels[is_test])


def draw_grid(digits: DigitSet, random: np.random.Generator) -> Grid:
    """Four digit images drawn with replacement."""
    chosen = random.integers(len(digits.labels), size=4)
    cells = digits.pixels[chosen].reshape(2, 2, DIGIT_SIDE, DIGIT_SIDE)
    pixels = cells.transpose(0, 2, 1, 3).reshape(2 * DIGIT_SIDE, 2 * DIGIT_SIDE)
    first, second, third, fourth = (int(label) for label in digits.labels[chosen])
    return Grid((first, second, third, fourth), pixels.repeat(SCALE, axis=0).repeat(SCALE, axis=1))


def to_image(grid: Grid) -> Image.Image:
    """A greyscale image, black on white like a scan."""
    return Image.fromarray(255 - grid.pixels)
