"""A saved model is a whole, movable folder in the published format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from alignkd.config.schema import ModelSection
from alignkd.errors import CheckpointError
from alignkd.models import saving
from alignkd.models.building import BuildOptions, full_tensors
from alignkd.models.configuration import MobileVLMConfig, read_model_config
from alignkd.models.families.mobilevlm import MobileVLM, public_name
from alignkd.models.loading import fingerprint, load_model, load_student
from alignkd.models.saving import FileFormat, save_model_folder
from tests import tiny
from tests.model_folders import TOWER, copy_model, plain_llama, published_tensors


def save(
    model: MobileVLM, out: Path, file_format: FileFormat = "safetensors", *, replace: bool = False
) -> None:
    tensors = {public_name(name): value for name, value in full_tensors(model)}
    save_model_folder(out, model.config, tensors, tiny.STUDENT, file_format, replace=replace)


def student(dtype: torch.dtype = torch.float32) -> MobileVLM:
    return load_model(tiny.STUDENT, BuildOptions(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_a_round_trip_is_bit_equal(tmp_path: Path, file_format: FileFormat, dtype: torch.dtype) -> None:
    model = student(dtype)
    save(model, tmp_path / "out", file_format)
    files = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}
    for kind, file in files.items():
        assert (tmp_path / "out" / file).exists() == (kind == file_format)
    again = load_model(tmp_path / "out", BuildOptions(dtype))
    assert fingerprint(again) == fingerprint(model)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["torch_dtype"] == str(dtype).removeprefix("torch.")
    given = json.loads((tiny.STUDENT / "config.json").read_text())
    assert {key: raw[key] for key in given if key != "torch_dtype"} == {
        key: value for key, value in given.items() if key != "torch_dtype"
    }


def test_saved_tensors_have_exactly_the_published_names(tmp_path: Path) -> None:
    save(student(), tmp_path / "out", "bin")
    saved = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert set(saved) == set(published_tensors())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json",
        "openai",
        "pytorch_model.bin",
        "special_tokens_map.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("absolute", [False, True], ids=["relative name", "absolute name"])
def test_a_moved_folder_finds_its_tower_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absolute: bool
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no hub"))
    source = copy_model(tmp_path / "source")
    if absolute:
        shutil.move(source / "openai" / TOWER.name, tmp_path / "clip")
        raw = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**raw, "mm_vision_tower": str(tmp_path / "clip")}))
    model = load_model(source, BuildOptions(torch.float32))
    save(model, tmp_path / "out")
    shutil.rmtree(source)
    shutil.rmtree(tmp_path / "clip", ignore_errors=True)
    moved = tmp_path / "elsewhere" / "student"
    moved.parent.mkdir()
    (tmp_path / "out").rename(moved)
    again = load_model(moved, BuildOptions(torch.float32))
    assert fingerprint(again) == fingerprint(model)
    assert again.config.tower_config == model.config.tower_config
    assert again.config.preprocessor_config == model.config.preprocessor_config


def test_a_tower_name_outside_the_folder_is_saved_inside_it(tmp_path: Path) -> None:
    source = copy_model(tmp_path / "models" / "source", mm_vision_tower="../clip")
    shutil.copytree(TOWER, tmp_path / "models" / "clip")
    (tmp_path / "saved").mkdir()
    save(load_model(source, BuildOptions(torch.float32)), tmp_path / "saved" / "out")
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["out"]
    assert (tmp_path / "saved" / "out" / "clip" / "config.json").is_file()
    assert read_model_config(tmp_path / "saved" / "out").mm_vision_tower == "clip"


def test_a_completed_llama_is_saved_as_a_mobilevlm(tmp_path: Path) -> None:
    section = ModelSection(student=str(plain_llama(tmp_path / "llama")), vision_tower=str(TOWER))
    model, _ = load_student(section, 0, BuildOptions(torch.float32))
    save(model, tmp_path / "out")
    saved = ModelSection(student=str(tmp_path / "out"))
    again, completed = load_student(saved, 1, BuildOptions(torch.float32))
    assert completed == []
    assert fingerprint(again) == fingerprint(model)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (raw["model_type"], raw["mm_projector_type"]) == ("mobilevlm", "ldpnetv2")


def test_an_interrupted_save_leaves_no_partial_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    reached = []

    def interrupted(path: Path, _: object) -> None:
        reached.append(path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(saving, "_write_json", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(student(), out)
    assert (reached[0].parent / "model.safetensors").exists(), "stopped in the middle, after the weights"
    assert not out.exists()
    save(student(), out)  # what the interrupted one left is no obstacle
    assert fingerprint(load_model(out, BuildOptions(torch.float32))) == fingerprint(student())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_existing_folder_is_refused_unless_replace_is_set(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(student(), out)
    (out / "stale").write_text("of the old one")
    with pytest.raises(CheckpointError, match=f"{out} exists; name a folder that does not"):
        save(student(), out)
    changed = student()
    changed.head.weight.data += 1
    save(changed, out, "bin", replace=True)
    assert fingerprint(load_model(out, BuildOptions(torch.float32))) == fingerprint(changed)
    assert not (out / "stale").exists()
    assert not (out / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_replacement_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    save(student(), out)

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(saving, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save(student(), out, replace=True)
    assert fingerprint(load_model(out, BuildOptions(torch.float32))) == fingerprint(student())


def test_the_newer_name_of_the_dtype_does_not_contradict(tmp_path: Path) -> None:
    source = copy_model(tmp_path / "source", dtype="float16")
    config: MobileVLMConfig = read_model_config(source)
    save_model_folder(tmp_path / "out", config, {"lm_head.weight": torch.zeros(2)}, source)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "dtype" not in raw
    assert raw["torch_dtype"] == "float32"
