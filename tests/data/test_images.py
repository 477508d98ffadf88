from __future__ import annotations

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from alignkd.data.image_paths import BadImage, resolve_below
from alignkd.data.images import ImageProcessor, pad_to_square


def png_with_header_only(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def save(path, size=(20, 10), mode="RGB", **options):
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).convert(mode).save(
        path, **options
    )


@pytest.mark.parametrize("number", [0, 1, 2])
def test_pixels_equal_those_of_the_authors(number, processor, expected, fixture_folder):
    pixels = processor.read(fixture_folder, f"image_{number}.png", "pad")
    assert pixels.shape == processor.shape == (3, 336, 336)
    assert pixels.dtype.is_floating_point
    difference = np.abs(pixels[:, ::7, ::7].numpy() - expected["pixel_values_every_7th"][number])
    assert difference.max() <= 1e-5


def test_square_crops_the_centre_instead_of_padding(processor, fixture_folder):
    padded = processor.read(fixture_folder, "image_0.png", "pad")
    cropped = processor.read(fixture_folder, "image_0.png", "square")
    assert cropped.shape == padded.shape
    assert not np.allclose(cropped, padded)


def test_padding_is_centred_in_the_given_colour():
    square = pad_to_square(Image.new("RGB", (5, 2), (9, 9, 9)), (1, 2, 3))
    pixels = np.asarray(square)
    assert pixels.shape == (5, 5, 3)
    assert (pixels[1:3] == 9).all()
    assert (pixels[[0, 3, 4]] == (1, 2, 3)).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_other_colour_modes_become_rgb(processor, tmp_path, mode):
    name = "a.tiff" if mode == "CMYK" else "a.png"
    save(tmp_path / name, mode=mode)
    assert processor.read(tmp_path, name, "pad").shape == (3, 336, 336)


def test_the_first_frame_of_an_animation_is_used(processor, tmp_path):
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    red.save(tmp_path / "two.gif", save_all=True, append_images=[blue])
    red.save(tmp_path / "one.png")
    two, one = (processor.read(tmp_path, name, "pad") for name in ("two.gif", "one.png"))
    np.testing.assert_allclose(two, one, atol=0.05)


def test_paths_may_not_leave_the_folder(tmp_path):
    folder, other = tmp_path / "images", tmp_path / "images-2"
    folder.mkdir()
    other.mkdir()
    save(other / "secret.png")
    (folder / "link.png").symlink_to(other / "secret.png")
    (folder / "linked").symlink_to(other)
    for path in ("link.png", "linked/secret.png", "../images-2/secret.png", str(other / "secret.png")):
        with pytest.raises(BadImage, match="leaves the image folder"):
            resolve_below(folder, path)


def test_a_link_inside_the_folder_and_a_linked_folder_are_allowed(tmp_path):
    (tmp_path / "images").mkdir()
    save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "b.png").symlink_to("a.png")
    (tmp_path / "linked").symlink_to("images")
    assert resolve_below(tmp_path / "linked", "b.png") == tmp_path.resolve() / "images" / "a.png"


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for path in ("pipe.png", "folder.png"):
        with pytest.raises(BadImage, match="not a regular file"):
            resolve_below(tmp_path, path)


@pytest.mark.parametrize("path", ["nothing.png", "a.png/b.png"])
def test_a_missing_image_is_named(processor, tmp_path, path):
    save(tmp_path / "a.png")
    with pytest.raises(BadImage, match="missing image") as caught:
        processor.read(tmp_path, path, "pad")
    assert path in str(caught.value)


def test_a_cycle_of_links_is_an_error(tmp_path):
    (tmp_path / "a.png").symlink_to("b.png")
    (tmp_path / "b.png").symlink_to("a.png")
    with pytest.raises(BadImage, match="unreadable image"):
        resolve_below(tmp_path, "a.png")


def test_a_truncated_image_is_broken(processor, tmp_path):
    save(tmp_path / "whole.png", size=(200, 200))
    whole = (tmp_path / "whole.png").read_bytes()
    for size in (0, 10, 60, len(whole) // 2):
        (tmp_path / "cut.png").write_bytes(whole[:size])
        with pytest.raises(BadImage, match="broken image"):
            processor.read(tmp_path, "cut.png", "pad")


def test_other_formats_are_not_decoded(processor, tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(BadImage, match="broken image"):
        processor.read(tmp_path, "a.png", "pad")


@pytest.mark.parametrize("size", [(1001, 1000), (10_000, 10_000), (2_000_000, 2_000_000)])
def test_a_large_image_is_refused_by_its_header(processor, tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png_with_header_only(*size))
    with pytest.raises(BadImage, match="image too large"):
        processor.read(tmp_path, "bomb.png", "square")


def test_the_limit_is_the_number_of_pixels(preprocessor_config, tmp_path):
    save(tmp_path / "a.png", size=(20, 20))
    assert ImageProcessor(preprocessor_config, 400).read(tmp_path, "a.png", "pad").shape == (3, 336, 336)
    with pytest.raises(BadImage, match=r"20 x 20; at most 399 pixels"):
        ImageProcessor(preprocessor_config, 399).read(tmp_path, "a.png", "pad")


def test_strips_that_would_grow_during_preprocessing_are_refused(processor, tmp_path):
    (tmp_path / "strip.png").write_bytes(png_with_header_only(500_000, 1))
    with pytest.raises(BadImage, match=r"image too large.*500000 x 500000 padded"):
        processor.read(tmp_path, "strip.png", "pad")
    with pytest.raises(BadImage, match="image too narrow"):
        processor.read(tmp_path, "strip.png", "square")
