from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from alignkd.run_folder.paths import RunPaths
from launcher.run.attempts import Attempt
from launcher.run.restarts import COUNTED, in_a_row, since_submission, suspected_nodes


@pytest.mark.parametrize(
    ("endings", "before", "count"),
    [
        ([], 0, 0),
        ([("crashed", 0)], 0, 1),
        ([("crashed", 0), ("crashed", 0)], 0, 2),
        ([("crashed", 0), ("crashed", 5), ("crashed", 0)], 0, 1),  # progress resets
        ([("crashed", 0), ("preempted", 0), ("lost", 0)], 0, 1),  # not the run's fault
        ([("time limit", 0), ("crashed", 0)], 0, 2),
        ([("crashed", 0), ("crashed", 0), ("crashed", 0)], 2, 1),  # the user has submitted the run again
    ],
)
def test_failures_without_progress_are_counted(
    tmp_path: Path, endings: list[tuple[str, int]], before: int, count: int
) -> None:
    with RunPaths(tmp_path).attempts.open("w") as file:
        for number, (reason, saved) in enumerate(endings, start=1):
            attempt = Attempt(number, "7", "n1", 0.0, 0, reason=reason, saved_step=saved)
            file.write(json.dumps(asdict(attempt)) + "\n")
    RunPaths(tmp_path).job.write_text(json.dumps({"attempts_before": before}))
    assert in_a_row(since_submission(tmp_path), COUNTED) == count


def ended(reason: str, node: str | None = None, saved: int = 0) -> Attempt:
    bad = (node,) if node is not None and reason.startswith("node") else ()
    failed = node if reason == "crashed" else None
    return Attempt(
        1, "7", "n[1-2]", 0.0, 0, reason=reason, saved_step=saved, failed_node=failed, bad_nodes=bad
    )


@pytest.mark.parametrize(
    ("endings", "count"),
    [
        ([], 0),
        ([ended("node lost", "n1"), ended("crashed", "n1"), ended("node lost", "n2")], 2),
        ([ended("node lost", "n1"), ended("node lost", "n2", saved=5)], 0),
        ([ended("node lost", "n1"), ended("preempted", saved=5), ended("node lost", "n2")], 1),
    ],
)
def test_lost_nodes_in_a_row_are_counted_since_the_last_new_checkpoint(
    endings: list[Attempt], count: int
) -> None:
    assert in_a_row(endings, ("node lost",)) == count


@pytest.mark.parametrize(
    ("endings", "suspects"),
    [
        ([], ()),
        ([ended("crashed", "n2")], ()),
        ([ended("crashed", "n2"), ended("crashed", "n1")], ()),
        ([ended("crashed", "n2"), ended("preempted"), ended("crashed", "n2")], ("n2",)),
        # A checkpoint in between does not clear a node: it crashed twice all the same.
        ([ended("crashed", "n2", saved=5), ended("crashed", "n2", saved=9)], ("n2",)),
        ([ended("crashed"), ended("crashed")], ()),  # nobody knows where
        ([ended("node lost", "n1")], ()),
        ([ended("node lost", "n1"), ended("crashed", "n1")], ("n1",)),
        ([ended("node at fault", "n2")], ("n2",)),
    ],
)
def test_nodes_that_failed_twice_or_lack_the_input_are_suspected(
    endings: list[Attempt], suspects: tuple[str, ...]
) -> None:
    assert suspected_nodes(endings) == suspects
