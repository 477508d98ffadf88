"""Conversions that are interrupted, damaged, repeated or impossible never change the checkpoint itself."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.checkpoint import ds_to_universal

from alignkd.checkpoint import universal
from alignkd.checkpoint.storage import Storage
from alignkd.checkpoint.universal import convert, is_converted
from alignkd.errors import CheckpointError, TrainingError
from alignkd.run_folder.checkpoints import MARKER, read_manifest, universal_folder
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.verification import verify
from launcher.backends.ranks import free_port, rank_environments, start_ranks
from tests import tiny
from tests.checkpoint.killed_conversion import PHASES
from tests.checkpoint.test_elastic import SAVED, assert_same_curve
from tests.engine.test_training_run import train_run
from tests.ranks import RankPool

STEP, STEPS = 6, 8


@pytest.fixture(scope="module")
def whole(two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody stopped, at stage 1 on two ranks: checkpoints of steps 4, 6 and 8."""
    run = tiny.write_run(
        tmp_path_factory.mktemp("whole") / "run", 2, student__zero_stage=1, training__epochs=2
    )
    assert two_ranks.run(train_run, str(run)) == [0, 0]
    return run


def stopped(whole: Path, to: Path, at: int = STEP) -> Path:
    """The same run as if it had been stopped at a step."""
    kept = shutil.ignore_patterns(
        *(f"step-{step}" for step in range(at + 1, STEPS + 1)), "student", "*.universal"
    )
    return Path(shutil.copytree(whole, to, ignore=kept))


def names(run: Path) -> set[str]:
    """In the folder of checkpoints; that of an attempt without what tells it from others."""
    found = {path.name for path in RunPaths(run).checkpoints.iterdir()}
    return {re.sub(r"\.[0-9a-f]{12}\.tmp$", ".tmp", name) for name in found}


def digests(run: Path) -> dict[str, Any]:
    files: dict[str, Any] = read_manifest(universal_folder(run, STEP))["files"]
    assert verify(universal_folder(run, STEP)) == []
    return files


def assert_source_is_whole(run: Path) -> None:
    folder = RunPaths(run).checkpoints / f"step-{STEP}"
    assert verify(folder) == []
    assert (folder / MARKER).exists()


@pytest.fixture(scope="module")
def converted(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run with a conversion."""
    run = stopped(whole, tmp_path_factory.mktemp("converted") / "run")
    convert(run, STEP, Storage())
    return run


@pytest.fixture(scope="module")
def killed(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By phase: a run whose conversion was killed there."""
    folder = tmp_path_factory.mktemp("killed")
    runs = {phase: stopped(whole, folder / phase) for phase in PHASES}
    cases = [str(word) for case in runs.items() for word in case]
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.killed_conversion", "convert", str(STEP), *cases],
        capture_output=True,
        text=True,
        timeout=300,
    )
    ended = [line.split() for line in done.stdout.splitlines() if line.split()[0] in PHASES]
    assert ended == [[phase, str(-signal.SIGKILL)] for phase in PHASES], done.stdout + done.stderr
    return runs


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_conversion_leaves_only_what_the_next_one_removes(
    killed: dict[str, Path], converted: Path, phase: str
) -> None:
    run = killed[phase]
    assert_source_is_whole(run)
    assert not is_converted(run, STEP)
    left = {
        "begin": set(),
        "mark": {f"step-{STEP}.universal"},
    }.get(phase, {f"step-{STEP}.universal.tmp"})
    assert names(run) == {"step-4", f"step-{STEP}", "latest"} | left
    convert(run, STEP, Storage())
    assert names(run) == {"step-4", f"step-{STEP}", "latest", f"step-{STEP}.universal"}
    assert digests(run) == digests(converted)
    assert_source_is_whole(run)


class Busy(Storage):
    """A conversion that was given up still writes: its folder fills while it is emptied."""

    def remove(self, folder: Path) -> None:
        if folder.name == f"step-{STEP}.universal.000000000000.tmp":
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(folder))
        super().remove(folder)


def test_a_conversion_that_was_given_up_does_not_block_the_next(
    whole: Path, converted: Path, tmp_path: Path
) -> None:
    run = stopped(whole, tmp_path / "run")
    (RunPaths(run).checkpoints / f"step-{STEP}.universal.000000000000.tmp").mkdir()
    convert(run, STEP, Busy())
    assert is_converted(run, STEP)
    assert digests(run) == digests(converted)


@pytest.fixture
def one_rank_run(whole: Path, one_rank: RankPool, tmp_path: Path) -> Path:
    """Stopped at step 6, and saved there by one rank."""
    run = stopped(whole, tmp_path / "run", at=4)
    tiny.resize_run(run, 1)
    assert one_rank.run(train_run, str(run), 2) == [SAVED]
    return run


def test_waiting_ranks_end_when_the_converting_one_is_killed_and_the_next_start_resumes(
    one_rank_run: Path, two_ranks: RankPool, whole: Path
) -> None:
    run = one_rank_run
    tiny.resize_run(run, 2)
    environments = rank_environments(1, 2, free_port(), "cpu", [], os.environ)
    RunPaths(run).logs.mkdir()
    command = [sys.executable, "-m", "tests.checkpoint.killed_conversion", "train", str(run), "parameters"]
    group = start_ranks(command, environments, RunPaths(run).logs)
    try:
        for _ in range(2):
            assert group.next_exit(180) is not None, "a rank waits for ever"
    finally:
        group.kill()
    assert group.codes[0] == -signal.SIGKILL
    assert group.codes[1] not in (0, -signal.SIGKILL)
    assert f"step-{STEP}.universal.tmp" in names(run)
    assert two_ranks.run(train_run, str(run)) == [0, 0]
    assert_same_curve(run, whole)
    assert not [name for name in names(run) if name.endswith(".tmp")]


def test_a_damaged_conversion_is_named_and_made_again(
    converted: Path, whole: Path, one_rank: RankPool, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(converted, tmp_path / "run"))
    part = next(iter(universal_folder(run, STEP).rglob("*mlp*/fp32.pt")))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    name = str(part.relative_to(universal_folder(run, STEP)))
    tiny.resize_run(run, 1)
    assert one_rank.run(train_run, str(run)) == [0]
    assert f"{name} has another sha256 than when it was written; converting again" in one_rank.log(0)
    assert_same_curve(run, whole)


def test_a_conversion_is_reused_only_for_the_same_checkpoint(converted: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(converted, tmp_path / "run"))
    before = (universal_folder(run, STEP) / "manifest.json").stat().st_ino
    convert(run, STEP, Storage())
    assert (universal_folder(run, STEP) / "manifest.json").stat().st_ino == before
    # The same step, saved once more: by whoever, with whatever weights.
    manifest = RunPaths(run).checkpoints / f"step-{STEP}" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    assert not is_converted(run, STEP)
    convert(run, STEP, Storage())
    assert is_converted(run, STEP)
    assert digests(run) == digests(converted)


@pytest.fixture
def _disk_full_after_ten_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = ds_to_universal._save_checkpoint, []

    def fail(path: str, state: Any) -> None:
        written.append(path)
        if len(written) > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        write(path, state)

    monkeypatch.setattr(ds_to_universal, "_save_checkpoint", fail)


@pytest.mark.usefixtures("_disk_full_after_ten_parts")
def test_a_conversion_on_a_full_disk_leaves_nothing(whole: Path, tmp_path: Path) -> None:
    run = stopped(whole, tmp_path / "run")
    with pytest.raises(TrainingError, match="No space left"):
        convert(run, STEP, Storage())
    assert names(run) == {"step-4", f"step-{STEP}", "latest"}
    assert_source_is_whole(run)


def test_too_little_room_is_reported_before_a_conversion_begins(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped(whole, tmp_path / "run")
    monkeypatch.setattr(universal, "SPACE_FACTOR", 1e9)
    with pytest.raises(CheckpointError, match="make room"):
        convert(run, STEP, Storage())
    assert names(run) == {"step-4", f"step-{STEP}", "latest"}


def test_what_deepspeed_cannot_convert_is_refused_on_every_rank(
    whole: Path, one_rank: RankPool, tmp_path: Path
) -> None:
    run = stopped(whole, tmp_path / "run")
    tiny.resize_run(run, 1, student__zero_stage=3)
    (message,) = one_rank.run(train_run, str(run))
    assert "student.zero_stage: the checkpoint has 1, the run has 3" in message
    # A checkpoint of stage 0 on another number of ranks.
    manifest = RunPaths(run).checkpoints / f"step-{STEP}" / "manifest.json"
    facts = json.loads(manifest.read_text())
    facts["config"]["student"]["zero_stage"] = 0
    manifest.write_text(json.dumps(facts))
    manifest.with_name(MARKER).write_text("")  # it would not fit the manifest any more
    tiny.resize_run(run, 1, student__zero_stage=0)
    (message,) = one_rank.run(train_run, str(run))
    assert "written by 2 ranks at student.zero_stage 0, and this run has 1" in message
    with pytest.raises(CheckpointError, match="DeepSpeed converts stages 1, 2 and 3 only"):
        convert(run, STEP, Storage())
    assert f"step-{STEP}.universal" not in names(run)


def test_changed_frozen_weights_are_refused_after_a_conversion(
    whole: Path, one_rank: RankPool, tmp_path: Path
) -> None:
    """DeepSpeed omits them from the universal format, and would train with whatever is there."""
    run = stopped(whole, tmp_path / "run")
    other = Path(shutil.copytree(tiny.FOLDER, tmp_path / "models")) / "student"
    weights = torch.load(other / "pytorch_model.bin", weights_only=True)
    name = next(name for name in weights if "vision_tower" in name and name.endswith("q_proj.weight"))
    weights[name] = weights[name] + 0.01
    torch.save(weights, other / "pytorch_model.bin")
    tiny.resize_run(run, 1, model__student=str(other))
    (message,) = one_rank.run(train_run, str(run))
    assert "frozen weights or buffers are not those of step-6" in message
    assert "model.student" in message


def test_the_convert_command_verifies_converts_and_reuses(
    converted: Path, whole: Path, tmp_path: Path
) -> None:
    run = stopped(whole, tmp_path / "run")

    def alignkd(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "launcher.cli", "ckpt", *arguments], capture_output=True, text=True
        )

    folder = universal_folder(run, STEP)
    done = alignkd("convert", str(run))
    assert (done.returncode, done.stdout) == (0, f"wrote {folder}\n"), done.stderr
    assert digests(run) == digests(converted)
    (folder / "zero" / "optimizer_state.pt").write_bytes(b"no pickle of ours")
    listed = json.loads(alignkd("verify", str(run), "--json").stdout)
    assert [(row["name"], row["state"]) for row in listed][-1] == (folder.name, "broken")
    assert alignkd("convert", str(run), "--step", str(STEP)).stdout == f"wrote {folder}\n"
    assert alignkd("convert", str(run)).stdout == f"{folder} is complete already\n"
    done = alignkd("convert", str(run), "--step", "5")
    assert done.returncode == 2
    assert "valid: 4, 6" in done.stderr
    # Its own shards are not unpickled either when they have changed.
    shard = RunPaths(run).checkpoints / "step-4" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shard.write_bytes(b"no pickle of ours")
    done = alignkd("convert", str(run), "--step", "4")
    assert done.returncode == 2
    assert shard.name in done.stderr
    assert "Traceback" not in done.stderr
