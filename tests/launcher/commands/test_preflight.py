"""Checks before a launch that need no back end."""

import importlib.util
import io
import json
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
from rich.console import Console

from alignkd.config import load_config
from alignkd.errors import EXIT_USER_ERROR, ConfigError
from alignkd.run_folder.atomic_files import write_json
from alignkd.teacher_cache.folder import CachePaths, Identity, Manifest
from alignkd.teacher_cache.key import cache_key
from alignkd.tracking.packages import missing_packages
from launcher.backends import backend_named
from launcher.backends.node_probe import Place, read_places
from launcher.commands.launch import LaunchRequest, launch
from launcher.commands.preflight import (
    MemoryCheck,
    check_stages,
    launch_problems,
    space_problems,
    tracker_warnings,
)
from launcher.plan.sizes import run_sizes
from launcher.plan.workload import Cluster
from tests.launcher.conftest import FIXTURE


def test_missing_disk_space_is_a_problem(make_config, monkeypatch) -> None:
    assert space_problems(make_config()) == []
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    (problem,) = space_problems(make_config())
    assert "4 checkpoints take about" in problem
    scratch = ["model.student=scratch", f"model.student_config={FIXTURE / 'student'}"]
    assert problem == space_problems(make_config(*scratch, f"model.vision_tower={FIXTURE / 'teacher'}"))[0]


def test_the_space_follows_from_the_parameters(make_config, monkeypatch) -> None:
    """fp32: 4 + 12 bytes of each trained number, 4 of each frozen one."""
    asked = []

    def usage(_place):
        return type("Usage", (), {"free": asked[-1]})

    monkeypatch.setattr("shutil.disk_usage", usage)
    sizes = run_sizes(make_config())
    trained, frozen = sum(sizes.trainable(make_config()).values()), sum(sizes.frozen(make_config()).values())
    need = 4 * (16 * trained + 4 * frozen)
    asked.append(need)
    assert space_problems(make_config()) == []
    asked.append(need - 1)
    assert len(space_problems(make_config())) == 1


def test_a_cache_that_does_not_fit_is_refused_before_anything_is_written(config_file, tmp_path) -> None:
    cache = tmp_path / "cache"
    overrides = ("teacher.placement=cached", f"teacher.cache={cache}")
    request = LaunchRequest(config_file, backend="local", overrides=overrides)
    with pytest.raises(ConfigError) as caught:
        launch(request, Console(file=io.StringIO()))
    assert caught.value.exit_code == EXIT_USER_ERROR
    (problem,) = caught.value.problems
    assert problem.startswith(f"{cache}: this cache of the teacher does not exist")
    assert not (config_file.parent / "runs").exists()


def test_held_out_data_that_are_missing_are_named(make_config) -> None:
    config = make_config("evaluation={every: 5, sources: [{file: /no/data.json, image_folder: /no/images}]}")
    problems = launch_problems(config, 2)
    assert [problem.partition(" = ")[0] for problem in problems] == [
        "evaluation.sources[0].file",
        "evaluation.sources[0].image_folder",
    ]
    assert [place.key for place in read_places(config)][-2:] == [
        "evaluation.sources[0].file",
        "evaluation.sources[0].image_folder",
    ]


def test_a_task_without_its_data_is_refused_before_anything_queues(make_config, tmp_path: Path) -> None:
    def problems(task: str) -> list[str]:
        section = f"evaluation={{every: 5, task: {task}, task_data: {tmp_path}, best: accuracy}}"
        config = make_config(section)
        assert read_places(config)[-1] == Place("folder", "evaluation.task_data", tmp_path)
        return launch_problems(config, 2)

    (unknown,) = problems("smaple")
    assert unknown.startswith("evaluation.task: task 'smaple' is unknown; valid: gqa,")
    assert unknown.endswith("sample; did you mean sample?")
    (missing,) = problems("sample")
    assert missing.startswith(f"evaluation.task: {tmp_path}: 2 files or folders are missing")
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "test.json").write_text(json.dumps([{"id": "1", "image": "1.png", "conversations": turns}]))
    (tmp_path / "images").mkdir()
    (pictures,) = problems("sample")
    assert "sample: 1 pictures are missing, such as" in pictures
    (tmp_path / "images" / "1.png").touch()
    assert problems("sample") == []


def test_a_tracker_without_its_package_is_refused_before_anything_is_written(
    config_file, tmp_path, monkeypatch
) -> None:
    """A folder of the package's name, as W&B makes them, does not count as the package."""
    find, gone = importlib.util.find_spec, ("tensorboard", "wandb")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else find(name))
    overrides = ("tracking.tensorboard=true", "tracking.wandb={project: p}")
    request = LaunchRequest(config_file, backend="local", overrides=overrides)
    with pytest.raises(ConfigError) as caught:
        launch(request, Console(file=io.StringIO()))
    assert caught.value.exit_code == EXIT_USER_ERROR
    assert caught.value.problems == [
        f"tracking.{name} needs the package {name}: pip install 'alignkd[trackers]'" for name in gone
    ]
    assert not (config_file.parent / "runs").exists()
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    (problem,) = missing_packages(load_config(config_file, ["tracking.wandb={project: p}"]).tracking)
    assert "tracking.wandb" in problem


@pytest.mark.parametrize(
    "elsewhere",
    [
        "slurm.python=/opt/python",
        "slurm.container={kind: pyxis, image: x}",
        "slurm.srun_options={container-image: x}",
    ],
)
def test_a_tracker_without_its_package_is_a_warning_where_the_ranks_have_a_python_of_their_own(
    make_config, monkeypatch, elsewhere: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    config = make_config("tracking.wandb={project: p}", elsewhere)
    problems, warnings = check_stages(
        [(None, config)], backend_named("local"), Cluster(1, 1), MemoryCheck(skip=True)
    )
    assert problems == []
    assert [warning.partition(" needs")[0] for warning in warnings if "was not asked" in warning] == [
        "tracking.wandb"
    ]
    assert launch_problems(make_config("tracking.wandb={project: p}"), 1) == missing_packages(config.tracking)
    assert tracker_warnings(make_config("tracking.wandb={project: p}")) == []


def test_the_cache_of_a_later_stage_is_refused_before_its_student_exists(make_config, tmp_path) -> None:
    upstream = tmp_path / "runs" / "one"
    cache = tmp_path / "cache"
    later = make_config(
        f"model.student={upstream / 'student'}", "teacher.placement=cached", f"teacher.cache={cache}"
    )
    assert not upstream.exists()
    (problem,) = launch_problems(later, 1, [upstream])
    assert problem.startswith(f"{cache}: this cache of the teacher does not exist")
    key = cache_key(make_config(), ())
    write_cache(cache, key | {"tokenizer": "not looked at"})
    assert launch_problems(later, 1, [upstream]) == []
    write_cache(cache, key | {"positions": "other"})
    (problem,) = launch_problems(later, 1, [upstream])
    assert problem.endswith(": other in the cache, supervised in the run")
    teacher_too = make_config(
        f"model.teacher={upstream / 'teacher'}", "teacher.placement=cached", f"teacher.cache={cache}"
    )
    assert launch_problems(teacher_too, 1, [upstream]) == []


def write_cache(folder: Path, key: dict[str, str]) -> None:
    """A finished cache of no samples."""
    manifest = Manifest(Identity(key, (), "", 8, 0, 2, "", "exact", 0), ())
    folder.mkdir(exist_ok=True)
    write_json(CachePaths(folder).manifest, manifest.as_json())


def test_a_run_that_reads_no_cache_does_not_look_for_one(make_config, tmp_path) -> None:
    assert launch_problems(make_config(f"teacher.cache={tmp_path / 'none'}"), 1) == []
    off = ("distillation.enabled=false", "teacher.placement=cached")
    assert launch_problems(make_config(*off), 1) == []
