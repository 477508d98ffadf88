"""Several runs at once, a process and a core each.

Not in ``__main__``: a spawned process does not import a package's ``__main__``, and would not find what it
is to run.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence import records
from benchmarks.evidence.bench import Bench
from benchmarks.evidence.conditions import CONDITIONS, Condition
from benchmarks.evidence.run import Settings, train_once

Run = tuple[str, int, Settings]


def work(
    opened: Callable[[], Bench], runs: list[tuple[Run, Path]], folder: Path, jobs: int, stop: float | None
) -> None:
    """Start runs until ``stop`` (of the monotonic clock), and wait for those that were started. Each process
    opens the bench for itself, from its files."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _one_thread) as pool:
        running: set[Future[str]] = set()
        for run, path in runs:
            if len(running) == jobs:
                running = _one_done(running)
            if stop is not None and time.monotonic() > stop:
                break
            running.add(pool.submit(record_run, opened, run, path, folder.name != "tuning"))
        while running:
            running = _one_done(running)


def _one_done(running: set[Future[str]]) -> set[Future[str]]:
    done, running = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        print(future.result(), flush=True)
    return running


def record_run(opened: Callable[[], Bench], run: Run, path: Path, with_test: bool) -> str:
    name, seed, settings = run
    condition: Condition = CONDITIONS[name]
    record: dict[str, Any] = train_once(opened(), condition, seed, settings, with_test=with_test)
    record["commit"] = _commit()
    records.write(path, record)
    last = record["validation"][-1]["accuracy"]
    return f"{path.name}: {record['seconds']} s, validation {last}"


def _one_thread() -> None:
    torch.set_num_threads(1)


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
