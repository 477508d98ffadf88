"""What a user types, with real processes: launch, a signal, resume, a killed rank, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alignkd.run_folder.checkpoints import committed_steps
from tests import tiny

MORE = f"""
tracking: {{tensorboard: true}}
evaluation: {{every: 6, samples: 4, sources: [{{file: data.json, image_folder: {tiny.FOLDER}}}]}}
"""


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    return write_configuration(tmp_path)


def write_configuration(tmp_path: Path) -> Path:
    """24 samples in 12 optimizer steps of about 0.2 s each."""
    records = [tiny.CASES[name]["record"] for name in ("v1", "rounds", "text")] * 16
    (tmp_path / "data.json").write_text(json.dumps(records))
    document = {
        "model": {"teacher": str(tiny.TEACHER), "student": str(tiny.STUDENT)},
        "data": {"sources": [{"file": "data.json", "image_folder": str(tiny.FOLDER)}], "workers": 1},
        "training": {
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "precision": "fp32",
            "learning_rate": 1e-3,
        },
        "checkpoint": {"every": 100},
    }
    path = tmp_path / "alignkd.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def alignkd(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
    )


def launch(configuration: Path, name: str) -> subprocess.Popen[str]:
    options = ("--nodes", "2", "--backend", "local", "--cpu", "--name", name)
    return alignkd("launch", *options, cwd=configuration.parent)


def finish(process: subprocess.Popen[str], timeout: float = 180) -> str:
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return output


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.05)


def steps_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def rank_processes(run: Path) -> list[int]:
    """Processes that run ``alignkd.train`` on this folder, without the loader workers that they forked."""
    found: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
            parent = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if b"alignkd.train" in words and str(run).encode() in words:
            found[int(path.parent.name)] = parent
    return [process for process, parent in found.items() if parent not in found]


def test_usr1_saves_and_resume_ends_as_if_nothing_had_happened(configuration: Path) -> None:
    """With a tracker beside rank 0, which ends with it and starts with it again, and with evaluations."""
    configuration.write_text(configuration.read_text() + MORE)
    runs = configuration.parent / "runs"
    whole = launch(configuration, "whole")
    assert finish(whole) is not None
    assert whole.returncode == 0
    stopped = launch(configuration, "stopped")
    wait_for(lambda: steps_of(runs / "stopped") >= 2, stopped)
    stopped.send_signal(signal.SIGUSR1)
    output = finish(stopped)
    assert stopped.returncode == 85, output
    assert "alignkd resume" in output
    assert 0 < committed_steps(runs / "stopped")[0] < 12
    resumed = alignkd("resume", str(runs / "stopped"), cwd=configuration.parent)
    output = finish(resumed)
    assert resumed.returncode == 0, output
    for row, expected in zip(
        tiny.metrics_rows(runs / "stopped"), tiny.metrics_rows(runs / "whole"), strict=True
    ):
        assert row["loss"] == expected["loss"]
    ours = load_file(runs / "stopped/student/model.safetensors")
    expected_weights = load_file(runs / "whole/student/model.safetensors")
    assert all(ours[name].equal(expected_weights[name]) for name in expected_weights)
    for name in ("whole", "stopped"):
        events = EventAccumulator(str(runs / name / "tracking/tensorboard"))
        events.Reload()
        losses = {event.step: event.value for event in events.Scalars("train/loss")}
        rows = tiny.metrics_rows(runs / name)
        assert losses == {row["step"]: pytest.approx(row["loss"]) for row in rows}
        assert [event.step for event in events.Scalars("evaluation/loss")] == [6, 12]
        assert len(events.Scalars("train/loss")) == len(rows) == 12


def test_a_killed_rank_stops_the_run(configuration: Path) -> None:
    run = configuration.parent / "runs" / "killed"
    process = launch(configuration, "killed")
    wait_for(lambda: steps_of(run) >= 1, process)
    os.kill(max(rank_processes(run)), signal.SIGKILL)
    output = finish(process)
    assert process.returncode not in (0, 2, 85, 86)
    assert "SIGKILL" in output
    assert rank_processes(run) == []


def test_ctrl_c_saves_and_stops(configuration: Path) -> None:
    run = configuration.parent / "runs" / "interrupted"
    process = launch(configuration, "interrupted")
    wait_for(lambda: steps_of(run) >= 1, process)
    process.send_signal(signal.SIGINT)
    output = finish(process)
    assert process.returncode == 86, output
    assert committed_steps(run), output
    assert "Traceback" not in output
    assert rank_processes(run) == []


def test_a_users_error_in_the_ranks_is_one_message(configuration: Path) -> None:
    data = json.loads((configuration.parent / "data.json").read_text())
    data[5]["image"] = "not-there.png"
    data[5]["id"] = "the-bad-one"
    data[5]["conversations"][0]["value"] = "<image>\nWhat is this?"
    (configuration.parent / "data.json").write_text(json.dumps(data))
    process = launch(configuration, "bad")
    output = finish(process)
    assert process.returncode == 2, output
    assert "the-bad-one" in output
    assert "not-there.png" in output
    assert "Traceback" not in output
