"""Where a vision tower's configuration is looked up, and how it is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from alignkd.errors import CheckpointError
from alignkd.models.configuration import read_model_config
from alignkd.models.tower import PUBLISHED_TOWER, portable_tower_name
from tests import tiny
from tests.model_folders import TOWER, TOWER_NAME, change_json, copy_model, plain_llama


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, whatever this machine has."""
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub"


def tower_at(folder: Path, **changes: Any) -> Path:
    shutil.copytree(TOWER, folder, ignore=shutil.ignore_patterns("*.bin"))
    change_json(folder / "config.json", **changes)
    return folder


def model_without_tower(folder: Path, **changes: Any) -> Path:
    copy_model(folder, **changes)
    shutil.rmtree(folder / "openai")
    return folder


def test_a_tower_is_looked_up_inside_then_beside_then_in_the_hub_cache(tmp_path: Path, hub: Path) -> None:
    model = model_without_tower(tmp_path / "models" / "student")
    found = []
    for place in (
        hub / ("models--" + TOWER_NAME.replace("/", "--")) / "snapshots" / "abc",
        tmp_path / "models" / TOWER_NAME,
        model / TOWER_NAME,
    ):
        tower_at(place, num_attention_heads=2 ** (len(found) + 1))
        found.append(read_model_config(model).tower_config["num_attention_heads"])
    assert found == [2, 4, 8]


def test_beside_a_linked_folder_means_beside_its_target(tmp_path: Path) -> None:
    model = model_without_tower(tmp_path / "models" / "student")
    tower_at(tmp_path / "models" / TOWER_NAME)
    (tmp_path / "link").symlink_to(model)
    assert read_model_config(tmp_path / "link").mm_hidden_size == 32


def test_the_newest_complete_hub_snapshot_is_used(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    model = model_without_tower(tmp_path / "student")
    snapshots = hub / ("models--" + TOWER_NAME.replace("/", "--")) / "snapshots"
    for age, name in ((100, "new"), (200, "old")):
        file = tower_at(snapshots / name, num_attention_heads=age // 50) / "config.json"
        os.utime(file, (10**9 - age, 10**9 - age))
    (snapshots / "broken").mkdir()
    (snapshots / "broken" / "config.json").symlink_to(tmp_path / "gone")
    assert read_model_config(model).tower_config["num_attention_heads"] == 2
    monkeypatch.setenv("HF_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    assert read_model_config(model).tower_config["num_attention_heads"] == 2


def test_the_published_tower_is_built_in_and_no_other(tmp_path: Path) -> None:
    published = model_without_tower(tmp_path / "a", mm_vision_tower=PUBLISHED_TOWER, mm_hidden_size=1024)
    tower = read_model_config(published).tower_config
    assert (tower["hidden_size"], tower["num_hidden_layers"], tower["image_size"]) == (1024, 24, 336)
    other = model_without_tower(tmp_path / "b", mm_vision_tower="openai/clip-vit-base-patch32")
    with pytest.raises(CheckpointError) as caught:
        read_model_config(other)
    for part in (str(other), "openai/clip-vit-base-patch32", "hub cache", f"only `{PUBLISHED_TOWER}`"):
        assert part in str(caught.value)


def test_keys_missing_in_a_clip_config_take_the_defaults_of_transformers(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig

    tower = tmp_path / "clip"
    tower.mkdir()
    (tower / "config.json").write_text('{"model_type": "clip", "vision_config": {"patch_size": 16}}')
    read = read_model_config(plain_llama(tmp_path / "llama"), tower).tower_config
    theirs = CLIPVisionConfig(patch_size=16).to_dict()
    assert read == {key: theirs[key] for key in read}


def test_old_and_new_preprocessing_files_mean_the_same(tmp_path: Path) -> None:
    old = {
        "crop_size": 336,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": 336,
    }
    tower = tower_at(tmp_path / "clip")
    llama = plain_llama(tmp_path / "llama")
    new = read_model_config(llama, tower).preprocessor_config
    (tower / "preprocessor_config.json").write_text(json.dumps(old))
    read = read_model_config(llama, tower).preprocessor_config
    (tower / "preprocessor_config.json").unlink()
    built_in = read_model_config(llama, tower).preprocessor_config
    assert new["size"] == {"shortest_edge": 336}
    for key in built_in:
        assert new[key] == read[key] == built_in[key], key


def test_a_crop_of_another_size_than_the_towers_is_refused(tmp_path: Path) -> None:
    tower = tower_at(tmp_path / "clip")
    change_json(tower / "preprocessor_config.json", crop_size=224)
    with pytest.raises(CheckpointError, match="`crop_size` is 224, but the tower takes 336 x 336 pixels"):
        read_model_config(plain_llama(tmp_path / "llama"), tower)


@pytest.mark.parametrize(
    ("name", "portable"),
    [
        (PUBLISHED_TOWER, PUBLISHED_TOWER),
        ("tower", "tower"),
        (f"/data/{PUBLISHED_TOWER}", PUBLISHED_TOWER),
        ("/data/my-clip/", "my-clip"),
        ("../../my-clip", "my-clip"),
        ("a/../../..", "tower"),
        ("/", "tower"),
    ],
)
def test_portable_names_stay_below_the_folder(name: str, portable: str) -> None:
    assert portable_tower_name(name) == portable


def test_a_mobilevlm_folder_can_serve_as_vision_tower() -> None:
    teacher = read_model_config(tiny.TEACHER)
    student = read_model_config(tiny.STUDENT, tiny.TEACHER)
    assert student.tower_config == teacher.tower_config
    assert student.mm_vision_tower == TOWER_NAME
