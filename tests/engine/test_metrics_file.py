from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from alignkd.config.schema import DistillationSection
from alignkd.data.batch import TermCounts
from alignkd.engine.metrics import Metrics
from alignkd.engine.optimizer_step import StepInfo, StepSums
from alignkd.engine.ranks import Ranks
from alignkd.engine.stopwatch import Reading
from alignkd.losses.total import TERMS
from tests.needs import small_disk
from tests.ranks import RankPool


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


def norms_in_rows(ranks: Ranks, folder: str, norms: list[Any]) -> list[float]:
    metrics = Metrics(Path(folder) / "metrics.jsonl", DistillationSection(), ranks)
    elements = dict.fromkeys(TERMS, 1)
    facts = StepInfo(TermCounts(samples=1), elements, usr1=False, term=False)
    found = []
    for step, norm in enumerate(norms, start=1):
        sums = StepSums(torch.ones(len(TERMS)), norm)
        metrics.add({"step": step}, sums, facts, Reading(0.0, []), 1.0, applied=True)
        metrics.flush()
        assert metrics.last is not None
        assert metrics.last["ce"] == metrics.last["vision_focus"] == 1.0
        found.append(metrics.last["gradient_norm"])
    return found


def test_a_gradient_norm_of_the_device_of_the_host_or_none(one_rank: RankPool, tmp_path: Path) -> None:
    (found,) = one_rank.run(norms_in_rows, str(tmp_path), [torch.tensor(3.0), 2.0, torch.tensor([4.0]), None])
    assert found[:3] == [3.0, 2.0, 4.0]
    assert math.isnan(found[3])


def test_rows_beyond_the_resumed_step_and_torn_ones_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    path.write_text("".join(rows) + '{"step": 2, "lo')
    metrics = Metrics(path, DistillationSection(), cast(Any, SimpleNamespace(is_first=True)))  # type: ignore[call-arg]
    metrics.cut_after(2)
    assert path.read_text() == "".join(rows[:2])
    path.write_bytes("".join(rows[:2]).encode() + b"\x00\xff\xfe")
    metrics.cut_after(2)
    assert path.read_text() == "".join(rows[:2])
    left = path.stat().st_ino
    metrics.cut_after(2)  # nothing to cut, nothing written: the disk may be full
    assert path.stat().st_ino == left
