"""Maps a function over tasks in several processes, with results in order."""

from __future__ import annotations

import gc
import multiprocessing
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from alignkd.data.worker_server import CONTEXT, start_worker, start_worker_server
from alignkd.errors import TrainingError

Task = TypeVar("Task")
Result = TypeVar("Result")

AHEAD = 4  # tasks per process that are submitted ahead of the result that is needed next

_function: Callable[[Any], Any]  # of a worker


def map_in_order(
    function: Callable[[Task], Result], tasks: Iterable[Task], processes: int
) -> Generator[Result, None, None]:
    """``map(function, tasks)`` in this many worker processes; in this process if it is 1.

    Tasks are consumed as they are needed. The function, tasks, results and exceptions must be picklable: no
    worker is forked from this process, which may have threads (``worker_server``). An exception of
    ``function`` is raised here, after the results before it; TrainingError if a worker is killed.
    """
    if processes == 1:
        yield from map(function, tasks)
        return
    others = set(multiprocessing.active_children())
    start_worker_server()
    pool = ProcessPoolExecutor(processes, CONTEXT, _start_worker, (function,))
    pending: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(_call, task))
            if len(pending) > AHEAD * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()  # the pool sends SIGTERM, which they have blocked, and waits for them
        raise TrainingError(
            "a process that was indexing the data ended before its work was done; if it was killed, memory "
            "has most likely run out: request more (slurm.memory), or fewer CPUs, since each runs such a "
            "process"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    start_worker(0)
    gc.disable()  # collections would traverse all that the server has imported and find nothing to free


def _call(task: Any) -> Any:
    return _function(task)
