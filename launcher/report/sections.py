"""The curves: every number of ``metrics.jsonl`` over the steps, in groups, whichever columns a run has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alignkd.run_folder.metrics import WEIGHT_OF
from launcher.report.charts import Panel, panel
from launcher.report.run_facts import RunFacts

_LOSSES = (
    "loss",
    "ce",
    "reverse_kl",
    "forward_kl",
    "js",
    "attention",
    "vision_all",
    "vision_focus",
    "vision",
)
# They count up or never change, and the table of facts has them.
_LEFT_OUT = ("total_steps", "epoch", "samples", "vision")


@dataclass(frozen=True)
class Section:
    title: str
    note: str
    panels: tuple[Panel, ...]


def sections_of(runs: Sequence[RunFacts]) -> list[Section]:
    """Groups without a column are left out. A column belongs to the first group that takes it."""
    waiting = list(dict.fromkeys(name for run in runs for name in run.columns.points))
    waiting = [name for name in waiting if name not in _LEFT_OUT and _says_something(runs, name)]
    found = []
    for title, note, logarithmic, takes in _GROUPS:
        names = [name for name in waiting if takes(name)]
        waiting = [name for name in waiting if name not in names]
        if names:
            panels = tuple(_panel(runs, name, logarithmic=logarithmic) for name in names)
            found.append(Section(title, note, panels))
    return found


def _panel(runs: Sequence[RunFacts], name: str, *, logarithmic: bool) -> Panel:
    series = [
        (number, run.name, run.columns.points[name])
        for number, run in enumerate(runs)
        if name in run.columns.points
    ]
    return panel(name, series, logarithmic=logarithmic)


def _says_something(runs: Sequence[RunFacts], name: str) -> bool:
    """Not 0 all the time, as the terms of a run without a teacher are."""
    return any(value != 0 for run in runs for value in run.columns.values(name))


_GROUPS: tuple[tuple[str, str, bool, Callable[[str], bool]], ...] = (
    (
        "Loss terms",
        "As metrics.jsonl has them, before their weights. Logarithmic.",
        True,
        lambda name: name in _LOSSES,
    ),
    (
        "Evaluations",
        "After a step: loss terms on evaluation.sources, and accuracy of evaluation.task.",
        False,
        lambda name: name.startswith("evaluation_"),
    ),
    (
        "Weights of the terms",
        "Those in use, which distillation.balance moves. Logarithmic.",
        True,
        lambda name: name.startswith(WEIGHT_OF),
    ),
    ("Learning rates", "", False, lambda name: "learning_rate" in name),
    (
        "Gradient norms",
        "Before clipping. Logarithmic.",
        True,
        lambda name: "gradient" in name or name.endswith("_norm"),
    ),
    (
        "Throughput",
        "Over all ranks; shares are of the time of a step, padding of the computed positions.",
        False,
        lambda name: name.endswith(("_per_second", "_seconds", "_share")),
    ),
    ("Memory", "Peak of rank 0 so far, in bytes.", False, lambda name: "memory" in name),
    ("Other columns", "", False, lambda name: True),
)
