"""``python -m tests.teacher.killed_cache FOLDER KILLS ...``: write caches that are killed again and again.

KILLS are numbers of file operations, separated by commas. Each start runs on one rank or on two, by turns;
every rank is killed before that operation of its own. A last start is left alone. The ranks are forked from
this process, which has imported what takes seconds. Prints how each start ended, a line per cache.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import alignkd.engine.shared_index  # what a rank imports when it needs it
import alignkd.teacher.cache_writer  # noqa: F401
from alignkd.distributed.ranks import start_ranks
from alignkd.teacher_cache.folder import CachePaths
from launcher.backends.ranks import free_port, rank_environments
from tests.cached import write_on


def die_before(operation: int, folder: str) -> None:
    """SIGKILL to this process before file ``operation`` (from 1) in the cache: to open a file for writing or
    for a flush, to rename one. The index does not count: whether it is written again depends on the time."""
    done = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        path = str(arguments[0]) if event in ("open", "os.rename") else ""
        if not path.startswith(f"{folder}/") or "index.bin" in path:
            return
        if event == "open" and arguments[1] is not None and "w" not in arguments[1]:
            return
        done += 1
        if done == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def start(folder: str, world_size: int, kill: int | None) -> int:
    """How rank 0 ended: an exit code, or a signal as a negative number."""
    processes = []
    for environment in rank_environments(1, world_size, free_port(), "cpu", [], os.environ):
        process = os.fork()
        if process == 0:
            os.environ.update(environment)
            try:
                run_rank(folder, kill)
            except BaseException as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        processes.append(process)
    first = os.waitstatus_to_exitcode(os.waitpid(processes[0], 0)[1])
    for process in processes[1:]:
        if first != 0:
            os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return first


def run_rank(folder: str, kill: int | None) -> None:
    torch.set_num_threads(1)
    ranks = start_ranks()
    if kill is not None:
        die_before(kill, folder)
    write_on(ranks, folder)
    dist.barrier()


def write_killed(folder: str, kills: Sequence[int]) -> dict[str, Any]:
    ends = [start(folder, 1 + number % 2, kill) for number, kill in enumerate(kills)]
    return {
        "ends": ends,
        "records": len(list(CachePaths(Path(folder)).shards.glob("*.json"))),
        "finished": CachePaths(Path(folder)).manifest.exists(),
        "last": start(folder, 2, None),
    }


if __name__ == "__main__":
    for folder, kills in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        print(json.dumps(write_killed(folder, [int(kill) for kill in kills.split(",")])), flush=True)
