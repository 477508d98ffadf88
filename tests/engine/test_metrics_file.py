from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from alignkd.config.schema import DistillationSection
from alignkd.engine.metrics import Metrics
from tests.needs import small_disk


def test_rows_that_did_not_fit_come_whole_when_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path, "8k"):
        ranks = cast(Any, SimpleNamespace(is_first=True))
        metrics = Metrics(tmp_path / "metrics.jsonl", DistillationSection(), ranks)  # type: ignore[call-arg]
        lines = [json.dumps({"step": step, "text": "x" * 3000}) + "\n" for step in (1, 2, 3)]
        for line in lines:
            metrics._unwritten.append(line)
            metrics._write_rows()
        assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:2])
        with pytest.raises(OSError, match="No space left"):
            metrics.sync()
        subprocess.run(["mount", "-o", "remount,size=1m", str(tmp_path)], check=True)
        metrics.sync()
        assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines)


def test_rows_beyond_the_resumed_step_and_torn_ones_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    path.write_text("".join(rows) + '{"step": 2, "lo')
    metrics = Metrics(path, DistillationSection(), cast(Any, SimpleNamespace(is_first=True)))  # type: ignore[call-arg]
    metrics.cut_after(2)
    assert path.read_text() == "".join(rows[:2])
    left = path.stat().st_ino
    metrics.cut_after(2)  # nothing to cut, nothing written: the disk may be full
    assert path.stat().st_ino == left
