"""A function mapped over tasks by several processes, with results in order."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from alignkd.errors import TrainingError

Task = TypeVar("Task")
Result = TypeVar("Result")

AHEAD = 4  # tasks per process that may be under way

_function: Callable[[Any], Any]  # of a worker


def map_in_order(
    function: Callable[[Task], Result], tasks: Iterable[Task], processes: int
) -> Generator[Result, None, None]:
    """``map(function, tasks)`` by so many processes; in this process if that is 1.

    Tasks are taken as they are needed. They, results and exceptions must be picklable. An exception of
    ``function`` is raised here, after the results before it; TrainingError when a process is killed.
    """
    if processes == 1:
        yield from map(function, tasks)
        return
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("fork")  # workers inherit the function and all that it reads
    pool = ProcessPoolExecutor(processes, context, _start_worker, (function,))
    pending: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(_call, task))
            if len(pending) > AHEAD * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()  # the pool sends SIGTERM, which they ignore, and would wait for ever
        raise TrainingError(
            "a process that indexes the data was killed, most often because memory ran out; ask for more "
            "(slurm.memory), or for fewer CPUs, each of which indexes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    gc.disable()  # collections would walk everything that was inherited, and find nothing to free
    # A signal that tells the rank to save or to stop reaches its workers too; the rank ends them.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """An idle worker would wait for ever for the next task of a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(task: Any) -> Any:
    return _function(task)
