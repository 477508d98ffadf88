"""The same function in several processes, results in order: forked, so that nothing is sent to them."""

from __future__ import annotations

import gc
import multiprocessing
import signal
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection
from typing import TypeVar

from alignkd.errors import TrainingError

Task = TypeVar("Task")
Result = TypeVar("Result")


def map_in_order(
    function: Callable[[Task], Result], tasks: Sequence[Task], processes: int
) -> Generator[Result, None, None]:
    """``map(function, tasks)``, task n by process n modulo ``processes``; in this process if that is 1.

    Results must be picklable; ``function`` must not raise, nor leave cycles of objects behind. A process that
    ends early raises RuntimeError, one that is killed TrainingError.
    """
    processes = min(processes, len(tasks))
    if processes < 2:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(processes)]

    def serve(own: int) -> None:
        gc.disable()  # a look at all that was inherited, again and again, finds nothing to free
        for name in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)  # the parent ends us when it is done, or is gone
        for number, (reader, writer) in enumerate(pipes):
            # A reader that stays open here would keep the others waiting for a parent that is gone.
            reader.close()
            if number != own:
                writer.close()
        _send_all(function, tasks[own::processes], pipes[own][1])

    workers = [context.Process(target=serve, args=(number,), daemon=True) for number in range(processes)]
    try:
        for worker in workers:
            worker.start()
        for _, writer in pipes:
            writer.close()
        for number in range(len(tasks)):
            try:
                yield pipes[number % processes][0].recv()
            except EOFError:
                ended = workers[number % processes]
                ended.join()
                if ended.exitcode == -signal.SIGKILL:
                    raise TrainingError(
                        "a process that indexes the data was killed, most often because memory ran out; ask "
                        "for more (slurm.memory), or for fewer CPUs, each of which indexes"
                    ) from None
                raise RuntimeError("a process of the index ended before its work was done") from None
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.kill()
                worker.join()
        for reader, writer in pipes:
            reader.close()
            writer.close()


def _send_all(
    function: Callable[[Task], Result], tasks: Sequence[Task], writer: Connection[Result, None]
) -> None:
    try:
        for task in tasks:
            writer.send(function(task))
    except BrokenPipeError:
        pass  # nobody waits for the rest
