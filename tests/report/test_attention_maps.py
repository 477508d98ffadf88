"""Attention maps of a run's models over its own data, against the fixture's blocks."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alignkd.data.images import pad_to_square
from alignkd.errors import UserError
from alignkd.report.__main__ import main
from alignkd.report.attention_maps import THUMBNAIL, attention_maps
from alignkd.run_folder.paths import RunPaths
from tests import tiny
from tests.model_folders import copy_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained in no step: its student is a copy of its teacher, so that the two must look alike."""
    folder = tiny.write_run(tmp_path_factory.mktemp("runs") / "run", 1, training__precision="fp32")
    copy_model(RunPaths(folder).student, source=tiny.TEACHER)
    return folder


def test_the_maps_are_the_blocks_of_the_attention_term(run: Path) -> None:
    found = attention_maps(run, 2, "cpu")
    assert (found["side"], found["top_k"]) == (12, 16)
    assert json.loads(json.dumps(found)) == found
    sample = found["samples"][0]
    record = tiny.CASES["v1"]["record"]
    assert sample["id"] == f"{record['id']}-0"
    assert sample["question"] == record["conversations"][0]["value"].replace("<image>", "").strip()
    assert sample["answer"] == record["conversations"][1]["value"]
    assert list(sample["maps"]) == ["teacher", "start", "student"]
    for name, of_model in (("teacher", "teacher"), ("start", "student")):
        block_HMV = tiny.expected()[f"v1.{of_model}_first_attention_block"][0]
        np.testing.assert_allclose(sample["maps"][name], block_HMV.mean(axis=(0, 1)), rtol=1e-4, atol=1e-7)
    assert sample["maps"]["student"] == sample["maps"]["teacher"]


def test_the_picture_is_what_the_models_see(run: Path) -> None:
    (sample,) = attention_maps(run, 1, "cpu")["samples"]
    head, _, data = sample["image"].partition(",")
    assert head == "data:image/jpeg;base64"
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), dtype=np.float32)
    assert picture.shape == (THUMBNAIL, THUMBNAIL, 3)
    with Image.open(tiny.FOLDER / tiny.CASES["v1"]["record"]["image"]) as file:
        padded = pad_to_square(file.convert("RGB"), (122, 116, 104))
    seen = np.asarray(padded.resize((THUMBNAIL, THUMBNAIL)), dtype=np.float32)
    assert np.abs(picture - seen).mean() < 4


def test_a_run_without_an_export_and_a_checkpoint_has_two_models(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("student"))
    (sample,) = attention_maps(copy, 1, "cpu")["samples"]
    assert list(sample["maps"]) == ["teacher", "start"]


def test_the_program_writes_json_or_one_error(run: Path, tmp_path: Path, capfd) -> None:
    out = tmp_path / "maps.json"
    assert main([str(run), str(out), "--samples", "1", "--device", "cpu"]) == 0
    assert len(json.loads(out.read_text())["samples"]) == 1
    assert main([str(tmp_path), str(out), "--samples", "1"]) == 2
    assert "alignkd: error: " in capfd.readouterr().err


def test_what_cannot_be_drawn_is_refused(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = RunPaths(copy).config.read_text()
    (tmp_path / "text.json").write_text(json.dumps([tiny.CASES["text"]["record"]]))
    for file in run.glob("*.json"):
        config = config.replace(str(file), str(tmp_path / "text.json"))
    RunPaths(copy).config.write_text(config)
    with pytest.raises(UserError, match="no sample with exactly one image"):
        attention_maps(copy, 1, "cpu")
