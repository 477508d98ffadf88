"""Turns image files into pixel values. Paths, headers and contents are untrusted, so each is checked
first."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from alignkd.data.image_paths import BadImage, resolve_below
from alignkd.errors import raise_if_passing

AspectRatio = Literal["pad", "square"]

# Formats that Pillow decodes itself (EPS, for example, would start Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# CLIP's crop first scales the short edge: a thin strip would become a huge intermediate image.
LARGEST_ASPECT_RATIO = 100


class ImageProcessor:
    """CLIP's preprocessing with a fixed back end (Pillow), shared by teacher and student."""

    def __init__(self, preprocessor_config: dict[str, Any], max_image_pixels: int) -> None:
        """``preprocessor_config``: contents of the tower's ``preprocessor_config.json``."""
        # Takes seconds to import, and only some commands need it.
        from transformers import CLIPImageProcessorPil

        known = {key: value for key, value in preprocessor_config.items() if key != "image_processor_type"}
        self._clip = CLIPImageProcessorPil(**known)
        self._max_image_pixels = max_image_pixels

    @property
    def shape(self) -> tuple[int, int, int]:
        """[3, H, W] of every processed image."""
        size = self._clip.crop_size
        return 3, int(size["height"]), int(size["width"])

    def read(self, folder: str | Path, path: str, aspect_ratio: AspectRatio) -> torch.Tensor:
        """The pixel values of ``path`` below ``folder``, float32 [3, H, W]. Raises BadImage, or
        FileSystemError, which says nothing about the image.

        ``pad`` pads the image to a square with the mean colour; ``square`` relies on CLIP's centre crop.
        """
        file = resolve_below(folder, path)
        return self._pixels(decode_image(file, path, self._max_image_pixels, aspect_ratio), aspect_ratio)

    def pixels(self, image: Image.Image, name: str, aspect_ratio: AspectRatio) -> torch.Tensor:
        """The same of a decoded image; ``name`` is for errors. Raises BadImage for its size."""
        _check_size(image.size, name, self._max_image_pixels, aspect_ratio)
        return self._pixels(image.convert("RGB"), aspect_ratio)

    def _pixels(self, image: Image.Image, aspect_ratio: AspectRatio) -> torch.Tensor:
        if aspect_ratio == "pad":
            image = pad_to_square(image, self._mean_colour)
        pixels: np.ndarray[Any, Any] = self._clip(image, return_tensors="np")["pixel_values"][0]
        return torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32))

    @property
    def _mean_colour(self) -> tuple[int, int, int]:
        red, green, blue = (int(mean * 255) for mean in self._clip.image_mean)
        return red, green, blue


def decode_image(file: Path, path: str, max_pixels: int, aspect_ratio: AspectRatio = "square") -> Image.Image:
    """The image in RGB, of an animation the first frame. ``path``: its name in messages. Raises BadImage."""
    with _opened(file, path, max_pixels, aspect_ratio) as image:
        return image.convert("RGB")


def image_size(file: Path, path: str, max_pixels: int) -> tuple[int, int]:
    """Width and height by the file's header. Raises BadImage."""
    with _opened(file, path, max_pixels, "square") as image:
        return image.size


@contextmanager
def _opened(file: Path, path: str, max_pixels: int, aspect_ratio: AspectRatio) -> Iterator[Image.Image]:
    try:
        # Opening reads the header only; pixels are decoded once the size has been checked.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked next
            image = Image.open(file, formats=FORMATS)
        with image:
            _check_size(image.size, path, max_pixels, aspect_ratio)
            yield image
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage("image too large", path, str(error)) from error
    except Exception as error:  # decoders raise nearly anything on corrupt bytes
        raise_if_passing(error, file)
        raise BadImage("broken image", path, f"{type(error).__name__}: {error}") from error


def _check_size(size: tuple[int, int], path: str, max_pixels: int, aspect_ratio: AspectRatio) -> None:
    width, height = size
    long, short = max(size), min(size)
    described, pixels = f"{width} x {height}", width * height
    if aspect_ratio == "pad" and width != height:
        described, pixels = f"{described}, {long} x {long} padded", long * long
    if pixels > max_pixels:
        limit = f"at most {max_pixels:,} pixels (data.max_image_pixels)"
        raise BadImage("image too large", path, f"{described}; {limit}")
    if long > LARGEST_ASPECT_RATIO * max(short, 1):
        raise BadImage("image too narrow", path, f"{described}; at most {LARGEST_ASPECT_RATIO} : 1")


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Centre an RGB image on a square with the side of its longer edge, as the authors do."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square
