"""The writer's side of metrics.jsonl: full disks, torn rows, rows of steps that are trained again."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from alignkd.run_folder.metrics import MetricsFile
from tests.needs import small_disk


def test_rows_that_a_full_disk_refused_are_written_whole_once_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path, "8k"):
        file = MetricsFile(tmp_path / "metrics.jsonl")
        rows = [{"step": step, "text": "x" * 3000} for step in (1, 2, 3)]
        lines = [json.dumps(row) + "\n" for row in rows]
        for row in rows:
            file.append(row)
        assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:2])
        with pytest.raises(OSError, match="No space left"):
            file.sync()
        subprocess.run(["mount", "-o", "remount,size=1m", str(tmp_path)], check=True)
        file.sync()
        assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines)


def test_rows_after_the_resumed_step_and_torn_ones_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    path.write_text("".join(rows) + '{"step": 2, "lo')
    file = MetricsFile(path)
    file.drop_rows_after(2)
    assert path.read_text() == "".join(rows[:2])
    path.write_bytes("".join(rows[:2]).encode() + b"\x00\xff\xfe")
    file.drop_rows_after(2)
    assert path.read_text() == "".join(rows[:2])
    left = path.stat().st_ino
    file.drop_rows_after(2)  # nothing to drop, nothing written: the disk may be full
    assert path.stat().st_ino == left


def test_numbers_that_json_does_not_have_become_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"step": 1, "loss": float("nan"), "gradient_norm": float("inf"), "ce": 0.5})
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row == {"step": 1, "loss": None, "gradient_norm": None, "ce": 0.5}
