"""Forked processes that answer in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from alignkd.data.processes import map_in_order
from alignkd.errors import TrainingError
from tests.ranks import RANK_NAME


def own_children() -> list[BaseProcess]:
    """Without the ranks that other tests share."""
    return [child for child in multiprocessing.active_children() if not child.name.startswith(RANK_NAME)]


def double(number: int) -> tuple[int, int]:
    time.sleep(0.01 * (number % 3))
    return 2 * number, os.getpid()


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_results_come_in_order_from_so_many_processes(processes: int) -> None:
    results = list(map_in_order(double, range(17), processes))
    assert [value for value, _ in results] == [2 * number for number in range(17)]
    found = {process for _, process in results}
    assert len(found) == processes
    assert (os.getpid() in found) == (processes == 1)
    assert own_children() == []


def test_who_stops_listening_leaves_no_process(tmp_path: Path) -> None:
    results = map_in_order(lambda _: b"x" * 1_000_000, range(100), 3)  # more than a pipe holds
    next(results)
    assert len(own_children()) == 3
    results.close()
    assert own_children() == []


@pytest.mark.parametrize("end", [lambda number: os._exit(1), lambda number: 1 / 0])
def test_a_process_that_ends_early_is_an_error(end: Callable[[int], object], capfd: object) -> None:
    with pytest.raises(RuntimeError, match="ended before its work was done"):
        list(map_in_order(end, range(4), 2))
    assert own_children() == []


def test_a_process_that_is_killed_is_an_error_with_a_reason() -> None:
    with pytest.raises(TrainingError, match=r"was killed, .* memory ran out"):
        list(map_in_order(lambda _: os.kill(os.getpid(), signal.SIGKILL), range(4), 2))
    assert own_children() == []
