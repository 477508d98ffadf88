"""Where the time of a run went, by its own records, and of the floor's steps; and the tables of both."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkd.run_folder.metrics import iter_rows
from alignkd.run_folder.paths import RunPaths

SHARES = {name: f"{name}_seconds_share" for name in ("teacher", "student", "optimizer")}
SHARES["data"] = "data_wait_share"
PARTS = ("teacher", "student", "optimizer", "data", "rest")
WORDS = {
    "teacher": "teacher's forward",
    "student": "student's forward and backward",
    "optimizer": "optimizer",
    "data": "waiting for data",
    "rest": "metrics, counts, messages of ranks",
}
STEPS_PER_SAVE = 500  # the default of checkpoint.every
WARM_UP = 1  # steps that are not counted: loader processes start, memory is allocated


@dataclass(frozen=True)
class FloorRun:
    """``steps``: seconds by part, of every step."""

    steps: list[dict[str, float]]
    cross_entropy: float  # of the first step

    def steps_and_loss(self) -> dict[str, Any]:
        return {"steps": self.steps, "cross_entropy": self.cross_entropy}


@dataclass(frozen=True)
class ProductRun:
    """``steps`` as above; other times in seconds."""

    steps: list[dict[str, float]]
    cross_entropy: float
    start_up: float  # from the command to the first step: processes, imports, index, models, engines
    save: float  # that one save held training
    export: float  # after the last step: the student's folder, the result
    whole: float  # from the command to its end


@dataclass
class Measured:
    """A shape on a number of ranks, in pairs of runs, one after the other."""

    length: int
    samples: int  # of a rank's micro-batch
    ranks: int
    floors: list[FloorRun] = field(default_factory=list)
    runs: list[ProductRun] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        pairs = zip(self.runs, self.floors, strict=True)
        return statistics.median(step_seconds(run.steps) / step_seconds(base.steps) for run, base in pairs)


def read_run(run: Path, whole: float) -> ProductRun:
    """Of a run that is done; ``whole``: seconds of the command that launched it."""
    rows = list(iter_rows(RunPaths(run).metrics))
    result = json.loads(RunPaths(run).result.read_text(encoding="utf-8"))
    steps = []
    for row in rows:
        seconds = {part: row[column] * row["step_seconds"] for part, column in SHARES.items()}
        steps.append({**seconds, "rest": row["step_seconds"] - sum(seconds.values())})
    saves = result["saves"]
    in_steps = sum(row["step_seconds"] for row in rows)
    return ProductRun(
        steps,
        rows[0]["ce"],
        start_up=whole - result["seconds"],
        save=saves["held_seconds"] / max(saves["committed"], 1),
        export=result["seconds"] - in_steps - saves["held_seconds"],
        whole=whole,
    )


def step_seconds(steps: Sequence[dict[str, float]]) -> float:
    """Of a step in the middle of the others."""
    return statistics.median(sum(step.values()) for step in steps[WARM_UP:] or steps)


def part_seconds(runs: Sequence[FloorRun] | Sequence[ProductRun], part: str) -> float:
    return statistics.median(step.get(part, 0.0) for run in runs for step in run.steps[WARM_UP:] or run.steps)


def whole_table(results: Sequence[Measured]) -> tuple[list[str], list[list[str]]]:
    head = ["L x samples", "ranks", "floor, s/step", "ours, s/step", "x floor"]
    head += [f"with a save every {STEPS_PER_SAVE}", "start-up, s", "a save holds, s", "export, s", "steps"]
    head += ["launch to done, s"]
    return head, [_whole_row(result) for result in results]


def _whole_row(result: Measured) -> list[str]:
    floor = statistics.median(step_seconds(run.steps) for run in result.floors)
    ours = statistics.median(step_seconds(run.steps) for run in result.runs)
    start_up, save, export, whole = (
        statistics.median(getattr(run, name) for run in result.runs)
        for name in ("start_up", "save", "export", "whole")
    )
    return [
        f"{result.length} x {result.samples}",
        str(result.ranks),
        f"{floor:.3f}",
        f"{ours:.3f}",
        f"{result.ratio:.2f}",
        f"{result.ratio + save / STEPS_PER_SAVE / floor:.2f}",
        *(f"{seconds:.1f}" for seconds in (start_up, save, export)),
        str(len(result.runs[0].steps)),
        f"{whole:.1f}",
    ]


def part_table(results: Sequence[Measured]) -> tuple[list[str], list[list[str]]]:
    """Of a step. The last column adds up to what a step is above its floor, but for medians."""
    head = ["L x samples", "ranks", "part", "floor, s", "ours, s", "difference, of the floor's step"]
    rows = []
    for result in results:
        floor = statistics.median(step_seconds(run.steps) for run in result.floors)
        for part in PARTS:
            base, own = part_seconds(result.floors, part), part_seconds(result.runs, part)
            name = [f"{result.length} x {result.samples}", str(result.ranks), WORDS[part]]
            rows.append([*name, f"{base:.3f}", f"{own:.3f}", f"{(own - base) / floor:+.1%}"])
    return head, rows
