"""The script that looks at folders, run by bash here. tests/slurm and test_ssh carry it to other nodes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from alignkd.run_folder.paths import RunPaths
from launcher.backends import node_probe
from launcher.backends.node_probe import (
    SCRIPT,
    Place,
    arguments,
    places_of,
    problems,
    run_place,
    tokens,
    unseen,
    warnings,
)
from tests.launcher.conftest import FIXTURE


def look(places: list[Place], node: str, token: str) -> str:
    quick = SCRIPT.replace(f"i < {node_probe.LATE_SECONDS}", "i < 1")
    words = ["bash", "-c", quick, "probe", node, *arguments(token, places)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


@pytest.fixture
def places(tmp_path: Path) -> list[Place]:
    for name in ("shared folder", "data 'x'"):
        (tmp_path / name).mkdir()
    (tmp_path / "data.json").write_text("[]")
    return [
        Place("shared", "run.folder", tmp_path / "shared folder"),
        Place("folder", "data.sources[0].image_folder", tmp_path / "data 'x'"),
        Place("file", "data.sources[0].file", tmp_path / "data.json"),
        Place("writable", "cache", tmp_path / "new" / "cache"),
    ]


def test_a_node_that_sees_everything_is_said_to(places: list[Place]) -> None:
    with tokens(places) as token:
        found = unseen(look(places, "n1", token), places)
    assert found == {"n1": []}
    assert (problems(found), warnings(found)) == ([], [])
    assert list(places[0].path.iterdir()) == []


def test_each_place_that_is_not_there_is_named_with_its_nodes(places: list[Place], tmp_path: Path) -> None:
    places[1].path.rmdir()
    places[2].path.unlink()
    (tmp_path / "new").write_text("a file")
    with tokens(places) as token:
        found = unseen(look(places, "n2", token) + look(places, "n1", token), places)
    assert problems(found) == [
        f"n1, n2 cannot see data.sources[0].image_folder = {tmp_path}/data 'x'",
        f"n1, n2 cannot see data.sources[0].file = {tmp_path}/data.json",
    ]
    assert warnings(found) == [f"n1, n2 cannot write cache = {tmp_path}/new/cache: indices are built anew"]


def test_another_folder_of_the_same_name_is_not_the_shared_one(places: list[Place]) -> None:
    with tokens(places) as token:
        assert unseen(look(places, "n1", token[::-1]), places) == {"n1": [places[0]]}
    assert problems({"n1": [places[0]]}) == [
        f"n1 cannot see run.folder = {places[0].path}: it must be on a file system that all nodes share"
    ]


def test_a_place_that_hangs_counts_as_not_seen(places: list[Place]) -> None:
    """The script is killed while it looks there: its answers end."""
    assert unseen("n1 yes run.folder\nn2", places) == {"n1": places[1:]}
    assert unseen("n1 yes run.folder\nn2", places, ["n2"]) == {"n2": places, "n1": places[1:]}


def test_a_shared_place_that_is_gone_here_too_is_not_an_error_here(tmp_path: Path) -> None:
    gone = [Place("shared", "checkpoints", tmp_path / "gone")]
    with tokens(gone) as token:
        assert unseen(look(gone, "n1", token), gone) == {"n1": gone}


def test_the_places_of_a_run_are_all_that_its_ranks_read_and_write(
    make_run, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ALIGNKD_CACHE", "/the/cache")
    run, _ = make_run()
    found = {place.key: (place.kind, str(place.path)) for place in places_of(run)}
    assert found == {
        "run.folder": ("shared", str(run)),
        "checkpoints": ("shared", str(run / "checkpoints")),
        "model.teacher": ("folder", str(FIXTURE / "teacher")),
        "model.student": ("folder", str(FIXTURE / "student")),
        "data.sources[0].file": ("file", str(tmp_path / "data.json")),
        "cache": ("writable", "/the/cache"),
    }
    RunPaths(run).checkpoints.rmdir()
    assert "checkpoints" not in {place.key for place in places_of(run)}  # the ranks make it
    RunPaths(run).checkpoints.symlink_to("/not/mounted")
    assert Place("shared", "checkpoints", RunPaths(run).checkpoints) in places_of(run)
    RunPaths(run).config.write_text("a: [")
    assert places_of(run)[0] == run_place(run)
