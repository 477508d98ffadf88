from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignkd.data.worker_server import CONTEXT, PRELOADED, SIGNALS, start_worker, start_worker_server
from tests.data.test_processes import alive, server_pid

LOCK = threading.Lock()


def status(pid: int, key: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith(f"{key}:"))


def answer_of(worker: Callable[[Any], None]) -> Any:
    """What ``worker`` sends from a process of the server."""
    ours, theirs = CONTEXT.Pipe()
    start_worker_server()
    process = CONTEXT.Process(target=worker, args=(theirs,))
    process.start()
    assert ours.poll(60), "the worker hangs"
    answer = ours.recv()
    process.join()
    return answer


def try_lock(pipe: Any) -> None:
    pipe.send((LOCK.acquire(blocking=False), os.getppid()))


def blocked(pipe: Any) -> None:
    start_worker(0)
    pipe.send(signal.pthread_sigmask(signal.SIG_BLOCK, ()))


def test_a_lock_that_a_thread_of_the_rank_holds_is_free_in_a_worker() -> None:
    with LOCK:
        free, parent = answer_of(try_lock)
    assert free
    assert parent == server_pid() != os.getpid()


def test_workers_are_forked_from_a_process_with_one_thread() -> None:
    answer_of(try_lock)  # the server has imported what it is to import
    assert status(server_pid(), "Threads") == "1"


def imported(pipe: Any) -> None:
    pipe.send([name for name in PRELOADED if name not in sys.modules])


def test_a_worker_starts_with_what_takes_seconds_to_import() -> None:
    """A name that is not found is passed over in silence."""
    assert answer_of(imported) == []


def test_signals_to_the_processes_of_a_rank_end_neither_server_nor_workers() -> None:
    server = server_pid()
    for number in SIGNALS:
        os.kill(server, number)
    free, parent = answer_of(try_lock)
    assert (free, parent) == (True, server)
    assert answer_of(blocked) >= set(SIGNALS) - {signal.SIGUSR2}
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(SIGNALS)  # here, nothing is blocked


ABANDONED = """
import os, signal, sys, time
from multiprocessing import forkserver
import torch
from torch.utils.data import DataLoader
from alignkd.data.worker_server import CONTEXT, start_worker, start_worker_server

start_worker_server()
loader = DataLoader(torch.arange(1000), batch_size=None, num_workers=1, multiprocessing_context=CONTEXT,
                    worker_init_fn=start_worker)
stream = iter(loader)
next(stream)
worker = stream._workers[0].pid
os.kill(worker, signal.SIGUSR2)
while "_worker_loop" not in open(sys.argv[1]).read():
    time.sleep(0.05)
print(worker, forkserver._forkserver._forkserver_pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_rank_leaves_no_process_and_a_worker_writes_its_stack_when_asked(tmp_path: Path) -> None:
    log = tmp_path / "rank.log"
    with log.open("w") as stderr:
        command = [sys.executable, "-c", ABANDONED, str(log)]
        finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=90)
    assert finished.returncode == -signal.SIGKILL, log.read_text()
    left = [int(pid) for pid in finished.stdout.split()]
    assert len(left) == 2
    deadline = time.monotonic() + 30
    while any(map(alive, left)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, left))
