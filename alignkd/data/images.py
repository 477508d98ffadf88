"""Image files -> pixel values. Paths, headers and contents come from strangers, so each is checked first."""

from __future__ import annotations

import stat
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from alignkd.errors import raise_if_passing

AspectRatio = Literal["pad", "square"]

# Formats of photographs and drawings whose decoders run inside Pillow (EPS, say, would start Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# A crop scales the short edge first: a thin strip would become a huge picture on the way.
LARGEST_ASPECT_RATIO = 100


class BadImage(Exception):
    """An image that cannot be used. ``reason`` is a short class of problems, to count by."""

    def __init__(self, reason: str, path: str, detail: str = "") -> None:
        self.reason = reason
        self.detail = f"{path!r:.300}" + (f" ({detail})" if detail else "")
        super().__init__(f"{reason}: {self.detail}")


class ImageProcessor:
    """CLIP's preprocessing with one fixed back end (Pillow), the same for teacher and student."""

    def __init__(self, preprocessor_config: dict[str, Any], max_image_pixels: int) -> None:
        """``preprocessor_config``: contents of the tower's ``preprocessor_config.json``."""
        # Seconds to import: here, before the loader's workers start, so that they share it.
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
        """``path`` below ``folder`` -> float32 [3, H, W]; raises :class:`BadImage`, or FileSystemError,
        which says nothing about the image.

        ``pad`` first pads to a square with the mean colour, ``square`` leaves the cut to CLIP's centre crop.
        """
        image = self._decode(resolve_below(folder, path), path, aspect_ratio)
        if aspect_ratio == "pad":
            image = pad_to_square(image, self._mean_colour)
        pixels: np.ndarray[Any, Any] = self._clip(image, return_tensors="np")["pixel_values"][0]
        return torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32))

    @property
    def _mean_colour(self) -> tuple[int, int, int]:
        red, green, blue = (int(mean * 255) for mean in self._clip.image_mean)
        return red, green, blue

    def _decode(self, file: Path, path: str, aspect_ratio: AspectRatio) -> Image.Image:
        try:
            # Opening reads the header only; pixels are decoded after the size is known to be fine.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours is checked next
                image = Image.open(file, formats=FORMATS)
            with image:
                self._check_size(image.size, path, aspect_ratio)
                return image.convert("RGB")  # the first frame of several
        except BadImage:
            raise
        except Image.DecompressionBombError as error:
            raise BadImage("image too large", path, str(error)) from error
        except Exception as error:  # decoders of foreign bytes raise nearly anything
            raise_if_passing(error, file)
            raise BadImage("broken image", path, f"{type(error).__name__}: {error}") from error

    def _check_size(self, size: tuple[int, int], path: str, aspect_ratio: AspectRatio) -> None:
        width, height = size
        long, short = max(size), min(size)
        described, pixels = f"{width} x {height}", width * height
        if aspect_ratio == "pad" and width != height:
            described, pixels = f"{described}, {long} x {long} padded", long * long
        if pixels > self._max_image_pixels:
            limit = f"at most {self._max_image_pixels:,} pixels (data.max_image_pixels)"
            raise BadImage("image too large", path, f"{described}; {limit}")
        if long > LARGEST_ASPECT_RATIO * max(short, 1):
            raise BadImage("image too narrow", path, f"{described}; at most {LARGEST_ASPECT_RATIO} : 1")


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Centres an RGB image on a square of its longer edge, as the authors do."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def resolve_below(folder: str | Path, path: str) -> Path:
    """The regular file that ``path`` names, links followed; it must lie below ``folder``."""
    try:
        root = Path(folder).resolve(strict=True)
        file = (root / path).resolve(strict=True)
        if not file.is_relative_to(root):
            raise BadImage("image path leaves the image folder", path)
        # A pipe or a device would block or never end.
        if not stat.S_ISREG(file.stat().st_mode):
            raise BadImage("image is not a regular file", path)
    except (FileNotFoundError, NotADirectoryError):
        raise BadImage("missing image", path, f"looked in {folder}") from None
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a NUL byte, a loop of links
        raise_if_passing(error, Path(folder) / path)
        raise BadImage("unreadable image", path, str(error)) from error
    return file
