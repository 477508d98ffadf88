"""A run folder of an earlier version (fixtures/old_run/SOURCE.md): today's commands read it and resume it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkd.run_folder.checkpoints import committed_steps
from alignkd.run_folder.paths import RunPaths
from tests.tiny import TIMES, metrics_rows

RECORDED = Path(__file__).parent / "fixtures" / "old_run"
RECORDED_ROOT = "/tmp/alignkd-old-run"
MACHINE: dict[str, str] = json.loads((RECORDED / "machine.json").read_text())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The recorded folder, moved: the paths in its configuration and its manifest are those of the copy."""
    root = tmp_path / "moved here"
    shutil.copytree(RECORDED, root)
    paths = RunPaths(root / "run")
    for path in (paths.config, paths.manifest):
        path.write_text(path.read_text().replace(RECORDED_ROOT, str(root)))
    return paths.run


def alignkd(*arguments: str) -> Any:
    """The command's JSON."""
    command = [sys.executable, "-m", "launcher.cli", *arguments, "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def same_machine() -> bool:
    names = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    return {"cpu": next(names, "").partition(": ")[2], "torch": torch.__version__} == MACHINE


def test_a_run_of_an_earlier_version_is_resumed_with_equal_metrics(run: Path) -> None:
    before = metrics_rows(run)
    expected = [json.loads(line) for line in (RECORDED / "expected.jsonl").read_text().splitlines()]
    assert [row["step"] for row in before + expected] == [1, 2, 3, 4, 5, 6]

    alignkd("resume", str(run))

    rows = metrics_rows(run)
    assert rows[:3] == before
    assert len(rows) == 6
    for row, other in zip(rows[3:], expected, strict=True):
        for name in sorted(other.keys() - TIMES):
            tolerance = {"rel": 0, "abs": 0} if same_machine() else {"rel": 1e-5}
            assert row[name] == pytest.approx(other[name], **tolerance), (row["step"], name)
    assert committed_steps(run) == [6, 3]
    assert (RunPaths(run).student / "model.safetensors").is_file()
    assert json.loads(RunPaths(run).result.read_text())["status"] == "done"


def test_a_run_of_an_earlier_version_is_read_by_the_commands(run: Path) -> None:
    state = alignkd("status", str(run))
    assert (state["state"], state["step"], state["total_steps"], state["attempts"]) == ("stopped", 3, 6, 1)
    assert state["reasons"] == ["stopped"]
    (checkpoint,) = alignkd("ckpt", "verify", str(run))
    assert (checkpoint["name"], checkpoint["state"], checkpoint["world_size"]) == ("step-3", "verified", 1)
