"""``python -m benchmarks.evidence``: train what has no record yet, most informative conditions first.

Stop it at any time and run it again: finished runs are skipped. ``--jobs`` runs go on at once, a core each.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from alignkd.text import counted
from benchmarks.evidence import records
from benchmarks.evidence.bench import Bench, open_bench
from benchmarks.evidence.conditions import BASELINE, CONDITIONS
from benchmarks.evidence.models import (
    BETTER_TEACHER_FILE,
    BETTER_TEACHER_SAMPLES,
    BETTER_TEACHER_STEPS,
    TEACHER_FILE,
    TEACHER_STEPS,
    train_better_teacher,
    train_teacher,
    write_folders,
)
from benchmarks.evidence.pool import Run, work
from benchmarks.evidence.run import Settings
from benchmarks.evidence.scenes import bench as scene_bench
from benchmarks.evidence.scenes import settings as scene_settings
from benchmarks.evidence.task import Sizes, build_task

CACHE = Path("build/evidence")
SEEDS = range(5)
# Settings are chosen with seeds of their own, on validation only.
TUNING_SEEDS = (100, 101)
TUNING_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
TUNING_STEPS = (1000, 2000)


@dataclass(frozen=True)
class Experiment:
    """A task with the settings of its runs. ``opened`` is sent to other processes."""

    opened: Callable[[], Bench]
    records: Path
    tuning: tuple[Run, ...]
    runs: tuple[Run, ...]


def main() -> None:
    options = _options()
    experiment = {"digits": _digits, "scenes": _scenes}[options.task](options)
    bench = experiment.opened()
    tuning = experiment.records / "tuning"
    untuned = missing(experiment.tuning, tuning, bench)
    if untuned and not options.tune:
        raise SystemExit(
            f"the settings are not chosen yet: {tuning} lacks {counted(len(untuned), 'record')}; first run "
            f"python -m benchmarks.evidence --tune --task {options.task}, and make the best its settings"
        )
    folder = tuning if options.tune else experiment.records
    todo = untuned if options.tune else missing(experiment.runs, folder, bench)
    stop = None if options.budget_minutes is None else time.monotonic() + 60 * options.budget_minutes
    work(experiment.opened, todo, folder, options.jobs, stop)


def _digits(options: argparse.Namespace) -> Experiment:
    sizes, cache = Sizes(), options.cache or CACHE
    if not TEACHER_FILE.exists():
        tokenizer = write_folders(cache)
        print("training the teacher", flush=True)
        train_teacher(cache, build_task(tokenizer, sizes), TEACHER_STEPS, TEACHER_FILE)
    opened = partial(open_bench, cache, sizes)
    if not BETTER_TEACHER_FILE.exists():
        print("training the better teacher", flush=True)
        tokenizer = write_folders(cache)
        more = build_task(tokenizer, Sizes(train=BETTER_TEACHER_SAMPLES, validation=1, test=1))
        train_better_teacher(opened().cache, more, BETTER_TEACHER_STEPS, BETTER_TEACHER_FILE)
    # One seed of all conditions after the other would compare early, but with one pair each: so the first
    # conditions get all their seeds first.
    names = options.conditions or CONDITIONS
    runs = tuple((name, seed, Settings()) for name in names for seed in options.seeds)
    return Experiment(opened, records.RECORDS, tuple(tuning_runs()), runs)


def _scenes(options: argparse.Namespace) -> Experiment:
    cache = options.cache or scene_settings.CACHE
    if not scene_bench.TEACHER_FILE.exists():
        print("training the teacher of the scenes", flush=True)
        scene_bench.train_scene_teacher(
            cache, scene_bench.SIZES, scene_bench.TEACHER_STEPS, scene_bench.TEACHER_FILE
        )
    names = options.conditions or scene_settings.CONDITIONS
    if unknown := [name for name in names if name not in scene_settings.CONDITIONS]:
        raise SystemExit(
            f"--conditions {unknown[0]}: of the digits only; valid for the scenes: "
            + ", ".join(scene_settings.CONDITIONS)
        )
    # Few runs, which may stop early: every seed is compared before the next one begins.
    runs = tuple((name, seed, scene_settings.SETTINGS) for seed in options.seeds for name in names)
    opened = partial(scene_bench.open_scenes, cache)
    return Experiment(opened, records.RECORDS / "scenes", scene_settings.TUNING, runs)


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
    better = CONDITIONS[name].better_teacher
    return {
        "condition": CONDITIONS[name].as_dict(),
        "seed": seed,
        "learning_rate": settings.learning_rate,
        "steps": round(settings.steps * CONDITIONS[name].steps),
        "batch": settings.batch,
        "teacher": bench.teacher_of(distilled=CONDITIONS[name].section().enabled),
        "data": bench.data,
        **({"better_teacher": bench.better_teacher} if better else {}),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("--task", choices=["digits", "scenes"], default="digits")
    parser.add_argument("--conditions", nargs="+", choices=list(CONDITIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--budget-minutes", type=float, help="start no run after so long")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="runs at once")
    parser.add_argument("--tune", action="store_true", help="the runs that the settings are chosen by")
    parser.add_argument("--cache", type=Path, help="folder for what the runs share")
    return parser.parse_args()


if __name__ == "__main__":
    main()
