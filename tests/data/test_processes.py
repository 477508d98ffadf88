"""Worker processes, and how they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from alignkd.data.processes import AHEAD, map_in_order
from alignkd.errors import TrainingError
from tests.ranks import RANK_NAME


def own_children() -> list[BaseProcess]:
    """Without the ranks that other tests share."""
    return [child for child in multiprocessing.active_children() if not child.name.startswith(RANK_NAME)]


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_results_come_in_order_from_all_processes(processes: int) -> None:
    all_take_one = multiprocessing.get_context("fork").Barrier(processes)

    def double(number: int) -> tuple[int, int]:
        if number < processes:
            all_take_one.wait(60)
        return 2 * number, os.getpid()

    results = list(map_in_order(double, range(17), processes))
    assert [value for value, _ in results] == [2 * number for number in range(17)]
    found = {process for _, process in results}
    assert len(found) == processes
    assert (os.getpid() in found) == (processes == 1)
    assert own_children() == []


def test_closing_early_leaves_no_process(tmp_path: Path) -> None:
    results = map_in_order(lambda _: b"x" * 1_000_000, range(100), 3)  # more than a pipe holds
    next(results)
    assert len(own_children()) == 3
    results.close()
    assert own_children() == []


@pytest.mark.parametrize("processes", [1, 3])
def test_tasks_are_taken_as_they_are_needed(processes: int) -> None:
    taken = []
    results = map_in_order(abs, (taken.append(number) or -number for number in range(1000)), processes)
    assert [next(results) for _ in range(10)] == list(range(10))
    assert len(taken) <= 10 + processes * AHEAD
    assert list(results) == list(range(10, 1000))


def test_an_exception_in_a_process_is_raised_here() -> None:
    with pytest.raises(ZeroDivisionError):
        list(map_in_order(lambda number: 1 // number, range(4), 2))
    assert own_children() == []


@pytest.mark.parametrize(
    "end", [lambda _: os._exit(1), lambda _: os.kill(os.getpid(), signal.SIGKILL)], ids=["exits", "is killed"]
)
def test_a_process_that_ends_early_is_one_error_with_the_likely_reason(
    end: Callable[[int], object], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        TrainingError, match=r"ended before its work was done; if it was killed, memory has most likely"
    ):
        list(map_in_order(end, range(4), 2))
    assert own_children() == []
    assert "Traceback" not in capfd.readouterr().err


def test_a_killed_idle_process_does_not_hang_the_others() -> None:
    """The first one waits for another task, and holds the lock of their queue while it waits."""
    both_have_one = multiprocessing.get_context("fork").Barrier(2)

    def name(number: int) -> int:
        both_have_one.wait(60)
        time.sleep(1.0 if number else 0)
        return os.getpid()

    results = map_in_order(name, range(2), 2)
    idle = next(results)
    time.sleep(0.2)
    os.kill(idle, signal.SIGKILL)
    with pytest.raises(TrainingError, match="was killed"):
        list(results)
    assert own_children() == []


def test_signals_that_tell_a_rank_to_save_do_not_end_its_workers() -> None:
    def survive(number: int) -> int:
        for signum in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), signum)
        return number

    assert list(map_in_order(survive, range(6), 3)) == list(range(6))


ABANDONED = """
import os, signal, sys, time
from alignkd.data.processes import map_in_order

def work(number):
    time.sleep(0.05)
    return os.getpid()

seen = set()
for pid in map_in_order(work, range(1000), 3):
    seen.add(pid)
    if len(seen) == 3:
        print(*seen, flush=True)
        {end}
"""


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "end", ["os.kill(os.getpid(), signal.SIGKILL)", "os.kill(os.getpid(), signal.SIGINT)"]
)
def test_workers_end_with_a_parent_that_is_killed_or_interrupted(end: str) -> None:
    script = [sys.executable, "-c", ABANDONED.replace("{end}", end)]
    finished = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert finished.returncode == (-signal.SIGKILL if "SIGKILL" in end else -signal.SIGINT)
    workers = [int(pid) for pid in finished.stdout.split()]
    assert len(workers) == 3
    deadline = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))
