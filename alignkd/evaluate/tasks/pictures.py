"""The pictures of a benchmark: files below its folder, or base64 inside a table."""

from __future__ import annotations

import base64
import binascii
import io
import os.path
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from alignkd.errors import UserError, raise_if_passing

# Formats whose decoders run inside Pillow (EPS, say, would start Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_ENCODED_BYTES = 64 * 2**20  # of one base64 text; MMBench's largest is far below


@dataclass(frozen=True)
class PictureFile:
    folder: Path
    path: str  # relative to `folder`

    def __str__(self) -> str:
        return str(self.folder / self.path)


@dataclass(frozen=True)
class EncodedPicture:
    where: str  # for errors: file and row
    base64: str

    def __str__(self) -> str:
        return self.where


Picture = PictureFile | EncodedPicture


def picture_file(folder: Path, path: str, where: str) -> PictureFile:
    """``path`` comes from a stranger's file: raises UserError if it would leave ``folder``."""
    leaves = os.path.isabs(path) or os.pardir in path.replace("\\", "/").split("/")
    if leaves or not path or "\0" in path:
        raise UserError(f"{where}: image {path!r:.200} must be a path below {folder}, without `..`")
    return PictureFile(folder, path)


def missing_pictures(pictures: Iterable[Picture]) -> list[PictureFile]:
    """Those that are no file, each once."""
    wanted = dict.fromkeys(picture for picture in pictures if isinstance(picture, PictureFile))
    return [picture for picture in wanted if not (picture.folder / picture.path).is_file()]


def require_picture(picture: PictureFile) -> Path:
    """Its path; raises UserError if there is no such file."""
    path = picture.folder / picture.path
    if not path.is_file():  # a pipe would block
        raise UserError(f"{picture}: the picture is missing or no regular file")
    return path


def open_picture(picture: Picture, max_pixels: int) -> Image.Image:
    """Decoded to RGB; raises UserError if it is missing, broken or has more than ``max_pixels``."""
    source: Path | io.BytesIO
    source = require_picture(picture) if isinstance(picture, PictureFile) else io.BytesIO(_decoded(picture))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked next
            image = Image.open(source, formats=FORMATS)
        with image:
            width, height = image.size  # from the header: nothing is decoded yet
            if width * height > max_pixels:
                raise UserError(f"{picture}: {width} x {height} pixels; at most {max_pixels:,} are decoded")
            return image.convert("RGB")
    except UserError:
        raise
    except Exception as error:  # decoders of foreign bytes raise nearly anything
        raise_if_passing(error, picture)
        raise UserError(f"{picture}: not a picture ({type(error).__name__}: {error})") from None


def _decoded(picture: EncodedPicture) -> bytes:
    if len(picture.base64) > MAX_ENCODED_BYTES:
        raise UserError(
            f"{picture}: its base64 has {len(picture.base64):,} characters, at most {MAX_ENCODED_BYTES:,}"
        )
    try:
        return base64.b64decode(picture.base64.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error) as error:
        raise UserError(f"{picture}: `image` is not base64 ({error})") from None
