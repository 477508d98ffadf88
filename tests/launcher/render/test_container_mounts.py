"""Which places the mounts of a container show, with real folders and links on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignkd.config.slurm_section import SlurmSection
from launcher.render.container_mounts import container_problems


def problems(path: Path, mounts: list[str], kind: str = "pyxis", **settings: object) -> list[str]:
    container = {"kind": kind, "image": "x", "mounts": mounts}
    slurm = SlurmSection.model_validate({"container": container, **settings})
    return container_problems(slurm, {"run.folder": path}, {"APPTAINER_BIND": "/bound,/from:/to:ro"})


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    for folder in ("a/runs", "a/b", "other"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


def test_without_a_container_everything_is_there() -> None:
    assert problems(Path("/runs/x"), [], kind="none") == []


def test_a_place_outside_all_mounts_is_named_with_the_remedy() -> None:
    assert problems(Path("/runs/x"), ["/data:/data", "/runs-too"]) == [
        "run.folder = /runs/x: no mount of the container shows it there; add FOLDER:FOLDER, for a folder "
        "that holds it, to slurm.container.mounts"
    ]


def test_a_mount_holds_what_is_below_it_at_the_same_path(disk: Path) -> None:
    run = disk / "a" / "runs" / "new"
    for mount in (f"{disk}:{disk}", f"{disk}/a:{disk}/a:rw", f"{disk}", f"{run}:{run}"):
        assert problems(run, [mount]) == []
    assert problems(run, [f"{disk}/a:/a"]) != []  # at another path
    assert problems(run, [f"{disk}/other:{disk}/a"]) != []  # something else at this path


def test_of_nested_mounts_the_inner_one_counts(disk: Path) -> None:
    whole, inner = f"{disk}:{disk}", f"{disk}/other:{disk}/a/b"
    assert problems(disk / "a" / "b" / "x", [whole, inner]) != []
    assert problems(disk / "a" / "c", [whole, inner]) == []


def test_a_link_needs_its_end_in_the_container(disk: Path) -> None:
    (disk / "a" / "link").symlink_to(disk / "other")
    path = disk / "a" / "link" / "x"
    assert problems(path, [f"{disk}/a:{disk}/a"]) != []
    assert problems(path, [f"{disk}/a:{disk}/a", f"{disk}/other:{disk}/other"]) == []
    assert problems(path, [f"{disk}/a/link:{disk}/a/link"]) == []  # the mount follows it
    assert problems(path, [f"{disk}:{disk}"]) == []


def test_each_container_has_mounts_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    home, bound = Path("/home/me/runs/x"), Path("/bound/x")
    assert problems(home, [], "apptainer") == problems(bound, [], "apptainer") == []
    assert problems(Path("/to/x"), [], "apptainer") != []  # that is /from/x
    assert problems(Path("/more/x"), [], "apptainer", export={"SINGULARITY_BINDPATH": "/more"}) == []
    assert problems(home, []) != []
    assert problems(bound, []) != []
    assert problems(home, [], srun_options={"container-mount-home": True}) == []


@pytest.mark.parametrize("kind", ["pyxis", "apptainer"])
def test_an_entry_may_hold_several_mounts(kind: str) -> None:
    mounts = ["/runs:/runs,/data", "/more:/more:ro,/models:/models"]
    for folder in ("/runs", "/data", "/more", "/models"):
        assert problems(Path(folder) / "x", mounts, kind) == []
    assert problems(Path("/other/x"), mounts, kind) != []


def test_srun_options_override_the_mounts_and_may_start_a_container_alone() -> None:
    other = {"container-image": "x", "container-mounts": "/runs:/runs,/data:/data"}
    assert problems(Path("/runs/x"), ["/elsewhere"], srun_options=other) == []
    assert problems(Path("/elsewhere/x"), ["/elsewhere"], srun_options=other) != []
    assert problems(Path("/elsewhere/x"), ["/elsewhere"], srun_options={"container-mounts": False}) != []
    assert problems(Path("/data/x"), [], "none", srun_options=other) == []
    assert problems(Path("/x"), [], "none", srun_options=other) != []
