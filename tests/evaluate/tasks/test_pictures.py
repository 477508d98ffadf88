import base64
import io
import os

import pytest
from PIL import Image

from alignkd.errors import UserError
from alignkd.evaluate.tasks import pictures
from alignkd.evaluate.tasks.pictures import (
    EncodedPicture,
    PictureFile,
    missing_pictures,
    open_picture,
    picture_file,
)


def encoded(image_format="PNG", size=(4, 2), mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, image_format)
    return base64.b64encode(buffer.getvalue()).decode()


def test_files_and_base64_are_decoded_to_rgb(tmp_path):
    Image.new("L", (4, 2), 7).save(tmp_path / "a.png")
    found = open_picture(picture_file(tmp_path, "a.png", "here"), 8)
    assert (found.mode, found.size, found.getpixel((0, 0))) == ("RGB", (4, 2), (7, 7, 7))
    assert open_picture(EncodedPicture("here", encoded(mode="RGBA")), 8).mode == "RGB"


def test_size_is_checked_before_decoding(tmp_path):
    with pytest.raises(UserError, match="row 3: 4 x 2 pixels; at most 7 are decoded"):
        open_picture(EncodedPicture("row 3", encoded()), 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("AAAA!", "`image` is not base64"),
        ("\u00e4", "`image` is not base64"),
        (encoded()[:64], "row 3: not a picture"),
        (encoded("PCX"), "row 3: not a picture"),  # Pillow reads it, but it is none of our formats
        ("", "row 3: not a picture"),
    ],
)
def test_broken_base64_is_one_error(text, message):
    with pytest.raises(UserError, match=message):
        open_picture(EncodedPicture("row 3", text), 100)


def test_huge_base64_is_not_decoded(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_ENCODED_BYTES", 10)
    with pytest.raises(UserError, match="its base64 has 12 characters, at most 10"):
        open_picture(EncodedPicture("row 3", "A" * 12), 100)


def test_missing_picture_folder_or_pipe_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("none.jpg", ".", "pipe.jpg"):
        with pytest.raises(UserError, match="is missing or no regular file"):
            open_picture(PictureFile(tmp_path, name), 100)


def test_broken_file_is_named(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff broken")
    with pytest.raises(UserError, match=r"a.jpg: not a picture"):
        open_picture(PictureFile(tmp_path, "a.jpg"), 100)


@pytest.mark.parametrize("path", ["../a.jpg", "a/../../b.jpg", "/etc/passwd", "..", "", "a\0b"])
def test_paths_out_of_the_folder_are_refused(tmp_path, path):
    with pytest.raises(UserError, match=r"line 3: image .* must be a path below"):
        picture_file(tmp_path, path, "line 3")


def test_dots_inside_a_name_are_fine(tmp_path):
    assert str(picture_file(tmp_path, "a..b/c...jpg", "here")) == str(tmp_path / "a..b" / "c...jpg")


def test_missing_pictures_are_listed_once(tmp_path):
    (tmp_path / "a.jpg").write_text("")
    there, missing = PictureFile(tmp_path, "a.jpg"), PictureFile(tmp_path, "b.jpg")
    assert missing_pictures([there, missing, EncodedPicture("x", ""), missing]) == [missing]
