"""Real ranks for tests: processes of one gloo group, started once, that run one function after another.

Starting ranks takes seconds (torch, transformers, deepspeed), so a test session shares them. A task is a
module-level function ``task(ranks, *arguments)``: every rank runs it, and its results come back in rank
order. A task that fails or hangs ends the processes, because a half-done collective cannot be repaired; the
next task starts new ones.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from alignkd.garbage import paused_collector
from launcher.backends.ranks import free_port, rank_environments

RANK_NAME = "alignkd-rank"
CONTEXT = multiprocessing.get_context("spawn")


class RankPool:
    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._logs = Path(tempfile.mkdtemp(prefix=f"alignkd-{world_size}-ranks-"))

    def run(self, task: Callable[..., Any], *arguments: Any, timeout: float = 180) -> list[Any]:
        """Results in rank order. After ``timeout`` seconds every rank prints its stack and the test fails."""
        if any(not process.is_alive() for process in self._processes):
            self.stop()
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((task, arguments, timeout))
        results, failures = [], []
        for rank, connection in enumerate(self._connections):
            try:
                ok, value = connection.recv() if connection.poll(timeout + 30) else (False, "no answer")
            except EOFError:
                ok, value = False, "exited without an answer"
            results.append(value)
            if not ok:
                failures.append(f"rank {rank}: {value}")
                break  # the others may wait for it forever
        if failures:
            self.stop()
            logs = [f"--- rank {rank}\n{self.log(rank)}" for rank in range(self.world_size)]
            raise AssertionError("\n".join(failures + logs))
        return results

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._connections = [], []

    def log(self, rank: int) -> str:
        path = self._logs / f"{rank}.log"
        return path.read_text(errors="replace")[-6000:] if path.exists() else ""

    def _start(self) -> None:
        environments = rank_environments(1, self.world_size, free_port(), "cpu", [], os.environ)
        for rank, environment in enumerate(environments):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=_serve,
                name=f"{RANK_NAME}-{rank}",
                args=(theirs, environment, self._logs / f"{rank}.log"),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)


def _serve(connection: Connection, environment: dict[str, str], log: Path) -> None:
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    with paused_collector():
        import torch

        import alignkd.engine.setup  # noqa: F401 (nearly all tasks need it)
        from alignkd.distributed.ranks import start_ranks

    torch.set_num_threads(1)
    ranks = start_ranks()
    while True:
        try:
            task, arguments, timeout = connection.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(timeout, exit=True)
        try:
            answer = (True, task(ranks, *arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        connection.send(answer)
