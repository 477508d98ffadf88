"""From a request to run folders and starts: sizes, stages, and what a dry run shows."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from alignkd.errors import ConfigError, UserError
from launcher.backends import backend_named, local, resolve_choice
from launcher.backends.base import Started
from launcher.backends.slurm import backend as slurm
from launcher.backends.slurm import client
from launcher.commands.launch import LaunchRequest, launch
from launcher.run.manifest import read_manifest

STAGES = "stages:\n  first: {run: {name: one}}\n  second: {run: {name: two}}\n"


@pytest.fixture
def allocation(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str | None]]:
    """Inside an allocation, where no launch asks Slurm first. Starts are recorded; each gives a job."""
    started: list[tuple[Path, str | None]] = []

    def start(_self: object, run: Path, _manifest: object, _console: object, after: str | None) -> Started:
        started.append((run, after))
        return Started(0, str(40 + len(started)))

    monkeypatch.setattr(slurm, "in_allocation", lambda: True)
    monkeypatch.setattr(slurm.SlurmBackend, "start", start)
    return started


def output_of(request: LaunchRequest) -> tuple[dict, str]:
    text = io.StringIO()
    return launch(request, Console(file=text, width=300)), text.getvalue()


def test_a_hostfile_gives_the_size_unless_options_do(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=4\nb slots=4\n")
    sizes = {"whole": (None, None), "part": (1, 2)}
    for name, (nodes, gpus_per_node) in sizes.items():
        request = LaunchRequest(
            config_file, nodes, gpus_per_node, "ssh", tmp_path / "hosts", name, dry_run=True,
            overrides=("training.micro_batch_size=1", "slurm.gpu_option=none"),
        )  # fmt: skip
        result, text = output_of(request)
        assert result == {"run": str(tmp_path / "runs" / name), "job": None, "code": 0}
        assert "nothing was started" in text
    whole, part = (read_manifest(tmp_path / "runs" / name) for name in sizes)
    assert (whole.nodes, whole.gpus_per_node, part.nodes, part.gpus_per_node) == (2, 4, 1, 2)
    hosts = json.loads((tmp_path / "runs" / "part" / "hosts.json").read_text())
    assert hosts == {"hosts": [{"name": "a", "slots": 4}]}


def test_a_site_says_how_many_gpus_a_node_has(
    config_file: Path, tmp_path: Path, allocation: list[tuple[Path, str | None]]
) -> None:
    """It counts for jobs on GPUs, unless an option does."""
    (tmp_path / "hosts").write_text("a slots=2\n")
    site = ("slurm.gpus_per_node=4", "training.micro_batch_size=1")
    cases = {
        "site": ((), None, "slurm", None, 4),
        "option": ((), 2, "slurm", None, 2),
        "cpu": (("slurm.gpu_option=none",), None, "slurm", None, 1),
        "here": (("slurm.gpu_option=none",), None, "local", None, 1),
        "hosts": ((), None, "ssh", tmp_path / "hosts", 2),
    }
    for name, (more, option, backend, hostfile, expected) in cases.items():
        gpus = () if more else ("slurm.gpu_option=gres",)
        request = LaunchRequest(
            config_file, None, option, backend, hostfile, name, overrides=(*site, *gpus, *more), dry_run=True
        )
        output_of(request)
        assert read_manifest(tmp_path / "runs" / name).gpus_per_node == expected, name
    config_file.write_text(
        config_file.read_text()
        + "stages:\n  first: {run: {name: one}}\n  second: {slurm: {gpus_per_node: 8}, run: {name: two}}\n"
    )
    request = LaunchRequest(config_file, backend="slurm", stages="first,second", dry_run=True)
    overridden = ("slurm.gpu_option=gres", "training.micro_batch_size=1")
    with pytest.raises(UserError, match=r"differs between the stages \(1, 8\); give --gpus-per-node"):
        output_of(replace(request, overrides=overridden))
    output_of(replace(request, overrides=overridden, gpus_per_node=2))


def test_without_hosts_a_run_has_one_rank(config_file: Path, tmp_path: Path) -> None:
    output_of(LaunchRequest(config_file, backend="local", dry_run=True))
    manifest = read_manifest(tmp_path / "runs" / "run")
    assert (manifest.nodes, manifest.gpus_per_node, manifest.backend) == (1, 1, "local")


def test_a_submitted_stage_waits_for_the_job_of_the_previous_one(
    config_file: Path, tmp_path: Path, allocation: list[tuple[Path, str | None]]
) -> None:
    config_file.write_text(config_file.read_text() + STAGES)
    request = LaunchRequest(
        config_file, 1, 1, "slurm", stages="first,second", overrides=("slurm.gpu_option=none",)
    )
    result, text = output_of(request)
    one, two = tmp_path / "runs" / "one", tmp_path / "runs" / "two"
    assert allocation == [(one, None), (two, "41")]
    assert [stage["job"] for stage in result["stages"]] == ["41", "42"]
    assert "submitted job 42 (waits for job 41)" in text
    assert json.loads((one / "next.json").read_text()) == {"run": str(two)}


def test_problems_of_all_stages_are_listed_by_stage_and_nothing_is_written(
    config_file: Path, tmp_path: Path
) -> None:
    config_file.write_text(config_file.read_text() + STAGES)
    request = LaunchRequest(config_file, 3, 1, "local", stages="first,second")
    with pytest.raises(ConfigError) as caught:
        output_of(request)
    assert "[stage first] training.global_batch_size = 8" in str(caught.value)
    assert "[stage second] training.global_batch_size = 8" in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_back_end_can_refuse_a_launch_and_add_warnings(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm.SlurmBackend, "preflight", lambda *_: (["no such partition"], ["a slow disk"]))
    text = io.StringIO()
    with pytest.raises(ConfigError, match="no such partition"):
        launch(LaunchRequest(config_file, 1, 1, "slurm"), Console(file=text, width=300))
    assert "warning: a slow disk" in text.getvalue()
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_shows_what_the_back_end_would_run(
    config_file: Path, tmp_path: Path, allocation: list[tuple[Path, str | None]]
) -> None:
    _, text = output_of(
        LaunchRequest(config_file, 2, 1, "slurm", overrides=("slurm.gpu_option=none",), dry_run=True)
    )
    assert f"would run: sbatch {tmp_path / 'runs' / 'run' / 'job.sbatch'}" in text
    assert allocation == []
    _, text = output_of(LaunchRequest(config_file, 2, 1, "local", name="here", dry_run=True))
    assert "would run 2 times: " in text
    assert "-m alignkd.train" in text


@pytest.mark.parametrize(("installed", "name"), [(True, "slurm"), (False, "local")])
def test_auto_is_slurm_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: bool, name: str
) -> None:
    monkeypatch.setattr(client, "slurm_is_installed", lambda: installed)
    monkeypatch.setattr(client, "slurm_answers", lambda: installed)
    assert resolve_choice("auto") == name
    assert resolve_choice("ssh") == "ssh"
    assert resolve_choice("auto", tmp_path / "hosts") == "ssh"


def test_a_silent_controller_never_makes_a_run_local(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of 32 GPUs once became 32 processes of the login node."""
    for name, code in (("sbatch", 0), ("scontrol", 1)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UserError, match=r"no Slurm controller answers .* --backend local"):
        output_of(LaunchRequest(config_file, 4, 8))
    assert not (tmp_path / "runs").exists()
    assert resolve_choice("local") == "local"


def test_missing_gpus_are_an_error_unless_the_cpu_is_asked_for(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = ("slurm.gpu_option=gres",)
    monkeypatch.setattr(local, "visible_gpus", lambda _environment: ["0"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(
        ConfigError, match=r"--gpus-per-node 2 needs 4 GPUs, and this machine has 1; .* --cpu"
    ):
        output_of(LaunchRequest(config_file, 2, 2, "local", overrides=gpus, dry_run=True))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(ConfigError, match=r"this machine has 1 \(CUDA_VISIBLE_DEVICES='7'\)"):
        output_of(LaunchRequest(config_file, 2, 2, "local", overrides=gpus, dry_run=True))
    assert not (tmp_path / "runs").exists()
    devices = {}
    for name, overrides, cpu, nodes in (
        ("one", gpus, False, 1),
        ("asked", gpus, True, 2),
        ("configured", (), False, 2),
    ):
        request = LaunchRequest(
            config_file, nodes, 1, "local", name=name, overrides=overrides, cpu=cpu, dry_run=True
        )
        _, text = output_of(request)
        devices[name] = read_manifest(tmp_path / "runs" / name).device
        assert ("on CPUs (gloo), as --cpu or slurm.gpu_option = none asks" in text) == (name != "one")
    assert devices == {"one": "auto", "asked": "cpu", "configured": "cpu"}


def test_only_slurm_has_a_queue_and_an_unknown_back_end_is_an_error() -> None:
    assert [backend_named(name).has_queue for name in ("local", "ssh", "slurm")] == [False, False, True]
    with pytest.raises(UserError, match="back end mpi: unknown; valid: local, slurm, ssh"):
        backend_named("mpi")
