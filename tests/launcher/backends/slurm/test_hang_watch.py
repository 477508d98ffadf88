"""The process that watches the ranks of a job for hangs. tests/slurm stops a rank on a real Slurm."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Collection
from pathlib import Path

import pytest

from launcher.backends.slurm import hang_watch
from launcher.run.hangs import Hang
from launcher.run.manifest import Manifest

HANG = Hang((1,), ("n2",), "rank 1 on n2 is behind")


class Watch:
    """Finds a hang at its second look."""

    interval = 0.0

    def __init__(self) -> None:
        self.looks: list[list[int]] = []

    def look(self, exited: Collection[int]) -> Hang | None:
        self.looks.append(list(exited))
        return HANG if len(self.looks) == 2 else None


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Hang]:
    """The hangs that are recorded; the script ends the process as soon as their ranks have been killed."""
    found: list[Hang] = []
    parents: list[int] = []

    def record(_run: Path, _size: int, hang: Hang, _ask: object) -> Hang:
        found.append(hang)
        return hang

    monkeypatch.setattr(os, "getppid", lambda: len(parents))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(hang_watch, "hostnames", lambda _nodes: ["n1", "n2"])
    monkeypatch.setattr(hang_watch, "record_hang", record)
    monkeypatch.setattr(hang_watch, "signal_ranks", lambda _step, name: parents.append(0))
    monkeypatch.setattr(hang_watch, "KILL_AGAIN_SECONDS", 0.0)
    return found


def test_a_file_system_that_fails_for_a_while_does_not_end_the_watch(
    run: Path, recorded: list[Hang], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[dict[int, int] | OSError] = [{}, OSError(errno.ESTALE, "Stale file handle"), {0: 0}]
    watch = Watch()

    def exit_codes(_run: Path) -> dict[int, int]:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(hang_watch, "exit_codes", exit_codes)
    monkeypatch.setattr(hang_watch, "HangWatch", lambda *_: watch)
    hang_watch.watch(run, "7")
    assert recorded == [HANG]
    assert watch.looks == [[], [0]]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["n1", "n2"], ["n1", "n1", "n2", "n2"]),
        (["n1", "n2", "n3", "n4"], ["n1", "n1", "n2", "n2"]),  # of a larger allocation
        (["n1"], []),
        ([], []),  # Slurm does not answer
    ],
)
def test_the_node_of_each_rank_is_known_by_the_size_of_the_run(
    make_run: Callable[..., tuple[Path, Manifest]],
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    expected: list[str],
) -> None:
    _, manifest = make_run(nodes=2, gpus_per_node=2)
    monkeypatch.setattr(hang_watch, "hostnames", lambda _nodes: names)
    assert hang_watch.rank_nodes(manifest) == expected
