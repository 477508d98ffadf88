"""Resizing a run folder: what changes, what is refused, and a rewrite that was interrupted."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from alignkd.config import load_run_config
from alignkd.errors import UserError
from alignkd.run_folder.paths import RunPaths
from launcher.backends import backend_named, local
from launcher.backends.base import Started
from launcher.backends.hostfile import Host
from launcher.backends.local import LocalBackend
from launcher.commands import resize
from launcher.commands.resize import fit_run, memory_warnings
from launcher.commands.resume import ResumeRequest, resume_run
from launcher.render.deepspeed import student_config, teacher_config
from launcher.render.job_scripts import render_scripts
from launcher.run import folder
from launcher.run.folder import create_run_folder
from launcher.run.manifest import Manifest, make_manifest, read_manifest
from tests.launcher.run.test_checkpoints import checkpoint

ALLOW = ("--allow-change", "training.learning_rate")


@pytest.fixture
def run(make_config) -> Path:
    """On four nodes of one rank; global batch 8, micro-batch 2."""
    return make(make_config(), "local")


def make(config, backend: str, device: str = "cpu") -> Path:
    manifest = make_manifest(config, 4, 1, 1, backend, device)
    return create_run_folder(
        config,
        manifest,
        student_config(config, 4, device),
        teacher_config(config, device),
        render_scripts(config, Path(config.run.folder) / config.run.name, 4, 1),
    )


def fitted(run: Path, nodes: int | None = None, gpus_per_node: int | None = None, **more) -> Manifest:
    return fit_run(run, read_manifest(run), nodes, gpus_per_node, **more)


def student(run: Path) -> dict:
    return json.loads((run / "ds" / "student.json").read_text())


def set_stage(run: Path, stage: int) -> None:
    text = (run / "config.yaml").read_text()
    assert "zero_stage: 2" in text
    (run / "config.yaml").write_text(text.replace("zero_stage: 2", f"zero_stage: {stage}"))


def snapshot(run: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_resize_keeps_the_global_batch_and_updates_every_file(run: Path) -> None:
    before = read_manifest(run)
    after = fitted(run, 1, 2)
    assert (after.nodes, after.gpus_per_node, after.world_size, after.accumulation_steps) == (1, 2, 2, 2)
    assert read_manifest(run) == after
    assert dataclasses.replace(after, nodes=4, gpus_per_node=1, world_size=4, accumulation_steps=1) == before
    assert student(run)["gradient_accumulation_steps"] == 2
    assert student(run)["train_batch_size"] == 8
    script = (run / "job.sbatch").read_text()
    assert "#SBATCH --nodes=1\n#SBATCH --ntasks-per-node=2" in script
    assert "--ntasks=2" in script
    assert "LOCAL_WORLD_SIZE=2" in (run / "rank.sh").read_text()
    assert os.access(run / "job.sbatch", os.X_OK)
    assert not RunPaths(run).resize_journal.exists()


def test_edits_of_env_sh_are_kept(run: Path) -> None:
    with (run / "env.sh").open("a") as file:
        file.write("export NCCL_DEBUG=INFO\n")
    before = (run / "env.sh").read_text()
    fitted(run, 2)
    assert (run / "env.sh").read_text() == before


def test_an_unchanged_size_changes_no_file(run: Path) -> None:
    with (run / "job.sbatch").open("a") as file:
        file.write("# by hand\n")
    before = snapshot(run)
    assert fitted(run) == fitted(run, 4, 1) == read_manifest(run)
    assert snapshot(run) == before


def test_an_impossible_split_lists_the_possible_ones(run: Path) -> None:
    before = snapshot(run)
    with pytest.raises(UserError, match=r"3 nodes x 1 rank .*fit with 1 rank each: 1, 2, 4"):
        fitted(run, 3)
    with pytest.raises(UserError, match=r"fit with 3 ranks each: none"):
        fitted(run, 1, 3)
    assert snapshot(run) == before


@pytest.mark.parametrize(
    ("saved", "stage", "nodes", "problem"),
    [
        (2, 1, None, None),
        (2, 1, 2, None),
        (1, 2, 2, None),
        (2, 3, None, "student.zero_stage: the checkpoint has 2, the run has 3"),
        (2, 0, None, "student.zero_stage: the checkpoint has 2, the run has 0"),
        (3, 2, 1, "student.zero_stage: the checkpoint has 3, the run has 2"),
        (0, 0, 2, "at student.zero_stage 0"),
    ],
)
def test_only_zero_stages_that_deepspeed_converts_are_accepted(
    run: Path, saved: int, stage: int, nodes: int | None, problem: str | None
) -> None:
    manifest = checkpoint(run, 10) / "manifest.json"
    facts = json.loads(manifest.read_text())
    facts |= {"world_size": 4, "config": {"student": {"zero_stage": saved}}}
    manifest.write_text(json.dumps(facts))
    set_stage(run, stage)
    before = snapshot(run)
    if problem is None:
        fitted(run, nodes)
        assert student(run)["zero_optimization"]["stage"] == stage
        return
    with pytest.raises(UserError, match=problem):
        fitted(run, nodes)
    assert snapshot(run) == before


@pytest.mark.parametrize("cut_off_after", [1, 3, 5])
def test_an_interrupted_rewrite_is_completed_by_the_next(
    run: Path, monkeypatch: pytest.MonkeyPatch, cut_off_after: int
) -> None:
    writes = []
    for room, name in ((resize, "write_json"), (folder, "write_text_atomic")):
        real = getattr(room, name)

        def write(*arguments, real=real, **options):
            writes.append(arguments)
            if len(writes) > cut_off_after:
                raise KeyboardInterrupt
            real(*arguments, **options)

        monkeypatch.setattr(room, name, write)
    with pytest.raises(KeyboardInterrupt):
        fitted(run, 2)
    monkeypatch.undo()
    assert RunPaths(run).resize_journal.exists()
    assert fitted(run).nodes == 2  # without the option
    whole = snapshot(run)
    shutil.rmtree(run / "ds")
    (run / "ds").mkdir()
    fitted(run, 4)
    fitted(run, 2)
    assert snapshot(run) == whole


def rendered_teacher(run: Path) -> dict | None:
    path = RunPaths(run).teacher_deepspeed
    return json.loads(path.read_text()) if path.exists() else None


def test_a_resume_renders_the_teacher_for_another_placement(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalBackend, "start", lambda *_: Started(0, None))
    text = (run / "config.yaml").read_text()
    assert "placement: zero3\n" in text
    for before, after in itertools.pairwise(["zero3", "cached", "zero3_offload", "zero3", "replicated"]):
        cache = "cache: /some/cache" if after == "cached" else "cache: null"
        changed = text.replace("placement: zero3\n", f"placement: {after}\n").replace("cache: null", cache)
        (run / "config.yaml").write_text(changed)
        resume_run(run, ResumeRequest(), Console(quiet=True))
        config = load_run_config(RunPaths(run).config)
        assert config.teacher.placement == after
        assert rendered_teacher(run) == teacher_config(config, "cpu"), (before, after)
        assert (rendered_teacher(run) is None) == (after in ("cached", "replicated"))
        rendered = snapshot(run / "ds")
        resume_run(run, ResumeRequest(), Console(quiet=True))
        assert snapshot(run / "ds") == rendered


def test_edits_of_a_rendered_teacher_are_kept(run: Path) -> None:
    path = RunPaths(run).teacher_deepspeed
    teacher = json.loads(path.read_text())
    teacher["zero_optimization"]["stage3_prefetch_bucket_size"] = 7
    path.write_text(json.dumps(teacher))
    before = snapshot(run)
    fitted(run)
    assert snapshot(run) == before


def test_the_ssh_back_end_needs_enough_hosts_and_slots(make_config) -> None:
    run = make(make_config(), "ssh")
    backend_named("ssh").prepare(run, [Host(name, 2) for name in "abcd"])
    assert fitted(run, 2).world_size == 2
    assert fitted(run, 4).world_size == 4  # the other hosts are still known
    with pytest.raises(UserError, match="2 slots each"):
        fitted(run, 1, 4)
    backend_named("ssh").prepare(run, [Host("a", 2)])
    with pytest.raises(UserError, match=r"hosts.json has 1 host; name more with --hostfile"):
        fitted(run, 2)
    assert fitted(run, 2, hosts=[Host("x", 1), Host("y", 1)]).nodes == 2
    assert [host["name"] for host in json.loads((run / "hosts.json").read_text())["hosts"]] == ["x", "y"]


def test_the_local_back_end_needs_enough_gpus(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(make_config(), "local", "auto")
    monkeypatch.setattr(local, "visible_gpus", lambda _environment: ["0", "1"])
    with pytest.raises(UserError, match="takes 4 GPUs and this machine has 2"):
        fitted(run, 2, 2)
    assert fitted(run, 2).world_size == 2


def test_fewer_ranks_that_would_not_fit_give_a_warning(make_config) -> None:
    run = make(make_config("slurm.gpu_memory=80G"), "slurm", "auto")
    assert memory_warnings(run, read_manifest(run)) == []
    small = make(make_config("slurm.gpu_memory=1M", "run.name=small"), "slurm", "auto")
    (warning,) = memory_warnings(small, read_manifest(small))
    assert "alignkd plan" in warning


def test_a_rollback_to_a_missing_or_broken_step_is_refused(run: Path) -> None:
    (checkpoint(run, 10) / "shard.pt").write_bytes(b"weightz")
    checkpoint(run, 20)
    before = snapshot(run)
    for step, message in ((15, "valid: 10, 20"), (10, "step-10 is broken: shard.pt has another sha256")):
        done = subprocess.run(
            [sys.executable, "-m", "launcher.cli", "resume", str(run), "--step", str(step), *ALLOW],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert message in " ".join(done.stderr.split())
    assert snapshot(run) == before


def test_a_refused_submission_changes_nothing(make_config, tmp_path: Path) -> None:
    """No checkpoint is set aside and no key is accepted."""
    run = make(make_config(), "slurm")
    for step in (10, 20):
        checkpoint(run, step)
    (run / "result.json").write_text('{"status": "done"}')
    before = snapshot(run)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 'no such account' >&2; exit 1\n")
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\n")
    for program in (tmp_path / "bin").iterdir():
        program.chmod(0o755)
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", "resume", str(run), "--step", "10", *ALLOW],
        capture_output=True, text=True, env={**clean, "PATH": str(tmp_path / "bin")},
    )  # fmt: skip
    assert (done.returncode, "no such account" in done.stderr) == (1, True)
    after = snapshot(run)
    assert {
        path: data
        for path, data in after.items()
        if Path(path).parent != RunPaths(run).writers and not path.endswith("/.lock")
    } == before
