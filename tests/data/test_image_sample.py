from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from alignkd.config.schema import DataSection
from alignkd.data import image_sample as module
from alignkd.data.image_sample import image_sample
from alignkd.data.index import build_index
from alignkd.data.tokenizer import SentencePieceTokenizer
from tests import tiny

IMAGES = 400


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A file of samples with one image each, and a sample without one; all images differ in size."""
    images = tmp_path / "images"
    images.mkdir()
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    records = [{"id": str(n), "image": f"{n}.png", "conversations": turns} for n in range(IMAGES)]
    text_only = [dict(turns[0], value="What?"), turns[1]]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "t", "conversations": text_only}, *records]))
    for number in range(IMAGES):
        (images / f"{number}.png").write_bytes(b"x" * (number + 1))
        os.utime(images / f"{number}.png", (1000, 1000))
    return tmp_path


def sample(folder: Path) -> dict[str, str]:
    source = {"file": str(folder / "data.json"), "image_folder": str(folder / "images"), "template": "v1"}
    data = DataSection.model_validate({"sources": [source]})
    tokenizer = SentencePieceTokenizer.from_folder(tiny.STUDENT)
    return image_sample(data, build_index(data, tokenizer, 144))


def test_images_that_moved_are_the_same(folder: Path, tmp_path: Path) -> None:
    before = sample(folder)
    moved = folder.rename(tmp_path.parent / f"{tmp_path.name}-moved")
    assert sample(moved) == before


def test_images_of_other_sizes_or_times_are_noticed(folder: Path) -> None:
    before = sample(folder)
    for number in range(0, IMAGES, 2):  # whatever the sample is, it holds some of these
        (folder / "images" / f"{number}.png").touch()
    after = sample(folder)
    assert after["sizes"] == before["sizes"]
    assert after["times"] != before["times"]
    for number in range(0, IMAGES, 2):
        (folder / "images" / f"{number}.png").write_bytes(b"y" * 1000)
    assert sample(folder)["sizes"] != before["sizes"]


def test_the_first_and_the_last_image_are_looked_at_and_a_missing_one_counts(folder: Path) -> None:
    before = sample(folder)["sizes"]
    seen = {before}
    for number in (0, IMAGES - 1):
        path = folder / "images" / f"{number}.png"
        shutil.move(path, folder / "aside")
        seen.add(sample(folder)["sizes"])
        shutil.move(folder / "aside", path)
    assert len(seen) == 3


def test_no_more_than_some_hundred_images_are_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    look = module._look

    def counted(root: str, path: str) -> tuple[int, int] | tuple[None, None]:
        looked.append(path)
        return look(root, path)

    monkeypatch.setattr(module, "_look", counted)
    sample(folder)
    assert len(looked) == len(set(looked)) == module.SAMPLES == 256
