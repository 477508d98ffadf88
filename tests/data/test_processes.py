"""Worker processes, and how they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from alignkd.data.processes import AHEAD, map_in_order
from alignkd.data.worker_server import CONTEXT, start_worker_server
from alignkd.errors import TrainingError
from tests.ranks import RANK_NAME

LOCK = threading.Lock()


def own_children() -> list[BaseProcess]:
    """Without the ranks that other tests share."""
    return [child for child in multiprocessing.active_children() if not child.name.startswith(RANK_NAME)]


def server_pid() -> int:
    start_worker_server()
    pid = vars(forkserver._forkserver)["_forkserver_pid"]
    assert isinstance(pid, int)
    return pid


def doubled(all_take_one: Any, processes: int, number: int) -> tuple[int, int]:
    if number < processes:
        all_take_one.wait(240)
    return 2 * number, os.getpid()


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_results_come_in_order_from_all_processes(processes: int) -> None:
    work = partial(doubled, CONTEXT.Barrier(processes), processes)
    results = list(map_in_order(work, range(17), processes))
    assert [value for value, _ in results] == [2 * number for number in range(17)]
    found = {process for _, process in results}
    assert len(found) == processes
    assert (os.getpid() in found) == (processes == 1)
    assert own_children() == []


def lock_state(_task: int) -> tuple[bool, int]:
    is_free = LOCK.acquire(blocking=False)
    if is_free:
        LOCK.release()
    return is_free, os.getppid()


def test_a_lock_that_a_thread_holds_is_free_in_all_processes() -> None:
    with LOCK:
        found = set(map_in_order(lock_state, range(6), 2))
    assert found == {(True, server_pid())}


def megabyte(_task: int) -> bytes:
    return b"x" * 1_000_000  # more than a pipe holds


def test_closing_early_leaves_no_process() -> None:
    results = map_in_order(megabyte, range(100), 3)
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


def reciprocal(number: int) -> int:
    return 1 // number


def test_an_exception_in_a_process_is_raised_here() -> None:
    with pytest.raises(ZeroDivisionError):
        list(map_in_order(reciprocal, range(4), 2))
    assert own_children() == []


def end_with_error(_task: int) -> None:
    os._exit(1)


def kill_self(_task: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("end", [end_with_error, kill_self], ids=["exits", "is killed"])
def test_a_process_that_ends_early_is_one_error_with_the_likely_reason(
    end: Callable[[int], object], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        TrainingError, match=r"ended before its work was done; if it was killed, memory has most likely"
    ):
        list(map_in_order(end, range(4), 2))
    assert own_children() == []
    assert "Traceback" not in capfd.readouterr().err


def own_id(both_have_one: Any, number: int) -> int:
    both_have_one.wait(240)
    time.sleep(1.0 if number else 0)
    return os.getpid()


def test_a_killed_idle_process_does_not_hang_the_others() -> None:
    """The first one waits for another task, and holds the lock of their queue while it waits."""
    results = map_in_order(partial(own_id, CONTEXT.Barrier(2)), range(2), 2)
    idle = next(results)
    time.sleep(0.2)
    os.kill(idle, signal.SIGKILL)
    with pytest.raises(TrainingError, match="was killed"):
        list(results)
    assert own_children() == []


def survive(number: int) -> int:
    for signum in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        os.kill(os.getpid(), signum)
    return number


def test_signals_that_tell_a_rank_to_save_do_not_end_its_workers() -> None:
    assert list(map_in_order(survive, range(6), 3)) == list(range(6))


ABANDONED = """
import os, signal, time
from alignkd.data import worker_server
from alignkd.data.processes import map_in_order

worker_server.PRELOADED.clear()  # seconds of imports

def work(number):
    time.sleep(0.05)
    return os.getpid()

if __name__ == "__main__":
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
def test_workers_end_with_a_parent_that_is_killed_or_interrupted(end: str, tmp_path: Path) -> None:
    script = tmp_path / "abandoned.py"
    script.write_text(ABANDONED.replace("{end}", end))
    command = [sys.executable, str(script)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert finished.returncode == (-signal.SIGKILL if "SIGKILL" in end else -signal.SIGINT)
    workers = [int(pid) for pid in finished.stdout.split()]
    assert len(workers) == 3
    deadline = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))
