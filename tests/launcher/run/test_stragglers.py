from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from alignkd.run_folder.heartbeat import Beat
from alignkd.run_folder.paths import RunPaths
from launcher.run.stragglers import Straggler, find_stragglers, stragglers


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({0: 1.0, 1: 1.1, 2: 1.0, 3: 1.0}, []),
        ({0: 1.0, 1: 1.5, 2: 1.0, 3: 2.0}, [Straggler(3, 2.0), Straggler(1, 1.5)]),
        ({0: 1.0, 1: 1.5}, [Straggler(1, 1.5)]),  # of two ranks, the faster is the measure
        ({0: 0.0, 1: 0.01}, []),  # not worth a word in a step of two seconds
        ({0: 1.0}, []),
    ],
)
def test_a_rank_far_above_the_median_is_a_straggler(own: dict[int, float], expected: list[Straggler]) -> None:
    assert stragglers(own, step_seconds=2.0) == expected


def test_times_come_from_the_heartbeats(tmp_path: Path) -> None:
    assert find_stragglers(tmp_path, 3) == []
    RunPaths(tmp_path).beats.mkdir()
    for rank, own in enumerate((1.0, 1.0, 4.0)):
        beat = Beat("training", 9, steps=9, step_seconds=5.0, own_seconds=own)
        RunPaths(tmp_path).beat(rank).write_text(json.dumps(asdict(beat)))
    RunPaths(tmp_path).beat(3).write_text(json.dumps(asdict(Beat("training", 9, steps=1))))  # not known yet
    assert find_stragglers(tmp_path, 5) == [Straggler(2, 4.0)]
