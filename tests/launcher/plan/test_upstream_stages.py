"""Where the shape of a model is described that an upstream stage has yet to train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from alignkd.config import Config
from launcher.plan.upstream_stages import config_folders, upstream_notes


@pytest.fixture
def stage(make_config, tmp_path: Path) -> Callable[..., Config]:
    """A stage that starts from ``student`` and, when it is given, from ``tower``."""

    def make(name: str, student: str, tower: str | None = None) -> Config:
        towers = [] if tower is None else [f"model.vision_tower={tmp_path / tower}"]
        config: Config = make_config(f"run.name={name}", f"model.student={tmp_path / student}", *towers)
        return config

    return make


def test_a_model_has_the_shape_of_what_its_runs_started_from(stage, tmp_path: Path) -> None:
    stages = [stage("one", "llama", "clip"), stage("two", "runs/one/student")]
    clip = str(tmp_path / "clip")
    assert config_folders(tmp_path / "runs/two/student", None, stages) == (tmp_path / "llama", clip)
    assert config_folders(tmp_path / "runs/one/student", None, stages) == (tmp_path / "llama", clip)
    assert config_folders(tmp_path / "other", None, stages) == (tmp_path / "other", None)


def test_a_tower_of_its_own_comes_before_the_upstream_models(stage, tmp_path: Path) -> None:
    stages = [stage("one", "llama", "clip")]
    model = tmp_path / "runs/one/student"
    assert config_folders(model, str(tmp_path / "own"), stages) == (tmp_path / "llama", str(tmp_path / "own"))
    # A tower can be that of a model which is yet to be trained.
    assert config_folders(tmp_path / "llama", str(model), stages) == (
        tmp_path / "llama",
        str(tmp_path / "clip"),
    )


def test_an_existing_model_describes_itself(stage, tmp_path: Path) -> None:
    model = tmp_path / "runs/one/student"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    stages = [stage("one", "llama", "clip")]
    assert config_folders(model, None, stages) == (model, None)
    assert upstream_notes(stage("two", "runs/one/student"), stages) == []


def test_stages_that_start_from_each_other_end(stage, tmp_path: Path) -> None:
    stages = [stage("one", "runs/two/student"), stage("two", "runs/one/student")]
    model = tmp_path / "runs/one/student"
    assert config_folders(model, None, stages) == (model, None)
