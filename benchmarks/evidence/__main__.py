"""``python -m benchmarks.evidence``: train what has no record yet, most informative conditions first.

Stop it at any time and run it again: finished runs are skipped. ``--jobs`` runs go on at once, a core each.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alignkd.text import counted
from benchmarks.evidence import records
from benchmarks.evidence.bench import Bench, open_bench
from benchmarks.evidence.conditions import BASELINE, CONDITIONS, Condition
from benchmarks.evidence.models import TEACHER_FILE, TEACHER_STEPS, train_teacher, write_folders
from benchmarks.evidence.run import Settings, train_once
from benchmarks.evidence.task import Sizes, build_task

CACHE = Path("build/evidence")
SEEDS = range(5)
# Settings are chosen with seeds of their own, on validation only.
TUNING_SEEDS = (100, 101)
TUNING_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
TUNING_STEPS = (1000, 2000)
Run = tuple[str, int, Settings]


def main() -> None:
    options = _options()
    sizes = Sizes()
    if not TEACHER_FILE.exists():
        tokenizer = write_folders(options.cache)
        print("training the teacher", flush=True)
        train_teacher(options.cache, build_task(tokenizer, sizes), TEACHER_STEPS, TEACHER_FILE)
    opened = partial(open_bench, options.cache, sizes)
    bench = opened()
    tuning = records.RECORDS / "tuning"
    untuned = missing(tuning_runs(), tuning, bench)
    if untuned and not options.tune:
        raise SystemExit(
            f"the settings are not chosen yet: {tuning} lacks {counted(len(untuned), 'record')}; first run "
            "python -m benchmarks.evidence --tune, and set the best as defaults in benchmarks/evidence/run.py"
        )
    folder = tuning if options.tune else records.RECORDS
    todo = untuned if options.tune else missing(sweep(options.conditions, options.seeds), folder, bench)
    stop = None if options.budget_minutes is None else time.monotonic() + 60 * options.budget_minutes
    work(opened, todo, folder, options.jobs, stop)


def sweep(conditions: Iterable[str], seeds: Iterable[int]) -> Iterator[Run]:
    """One seed of all conditions after the other would compare early, but with one pair each: so the first
    conditions get all their seeds first."""
    seeds = list(seeds)
    return ((name, seed, Settings()) for name in conditions for seed in seeds)


def tuning_runs() -> Iterator[Run]:
    return (
        (BASELINE, seed, Settings(rate, steps))
        for steps in TUNING_STEPS
        for rate in TUNING_RATES
        for seed in TUNING_SEEDS
    )


def missing(runs: Iterable[Run], folder: Path, bench: Bench) -> list[tuple[Run, Path]]:
    found = []
    for run in runs:
        name, seed, settings = run
        label = name if folder.name != "tuning" else f"{settings.learning_rate:g} {settings.steps}"
        path = records.path_of(folder, label, seed)
        if not records.is_finished(path, wanted(run, bench)):
            found.append((run, path))
    return found


def wanted(run: Run, bench: Bench) -> dict[str, Any]:
    """What the record of a run says about how it was made."""
    name, seed, settings = run
    return {
        "condition": CONDITIONS[name].as_dict(),
        "seed": seed,
        "learning_rate": settings.learning_rate,
        "steps": round(settings.steps * CONDITIONS[name].steps),
        "batch": settings.batch,
        "teacher": bench.teacher,
        "data": bench.data,
    }


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


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS), choices=list(CONDITIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--budget-minutes", type=float, help="start no run after so long")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="runs at once")
    parser.add_argument("--tune", action="store_true", help="the runs that the settings are chosen by")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for what the runs share")
    return parser.parse_args()


if __name__ == "__main__":
    main()
