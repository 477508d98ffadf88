"""``python -m benchmarks.evidence.table``: the tables and the plot of docs/evidence.md, from the records."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.evidence import curves, plots, records
from benchmarks.evidence.conditions import BASELINE, CONDITIONS
from benchmarks.evidence.curves import Groups
from benchmarks.evidence.statistics import (
    Mean,
    Paired,
    Record,
    gradient_shares,
    mean_accuracy,
    paired_difference,
    steps_to_reach,
    validation_accuracy,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "evidence.md"
PLOT = DOCUMENT.with_suffix("") / "accuracy.svg"
BEGIN, END = "<!-- tables: written by benchmarks.evidence.table -->", "<!-- end of the tables -->"
BEGIN_SCENES = "<!-- tables of the scenes: written by benchmarks.evidence.table -->"
FRESH_SEEDS = range(5, 10)  # of the digits: run for nothing but a question that the others had raised
LEARNT_KINDS = ("position", "text")
SHOWN_CURVES = {
    "position": (
        BASELINE,
        "attention",
        "attention x 100",
        "attention x 10000",
        "attention, row KL",
        "vision",
    ),
    "text": (BASELINE, "all", "no clipping", "labels on sums", "labels on hard kinds", "attention x 10000"),
}


def main() -> None:
    write_tables(records.RECORDS, BEGIN, PLOT, FRESH_SEEDS)
    write_tables(records.RECORDS / "scenes", BEGIN_SCENES, PLOT.with_name("scenes.svg"), ())


def write_tables(folder: Path, begin: str, picture: Path, fresh_seeds: Sequence[int]) -> None:
    """Those of the records in ``folder`` into the document, and their pictures."""
    text = with_tables(DOCUMENT.read_text(encoding="utf-8"), folder, begin, fresh_seeds)
    DOCUMENT.write_text(text, encoding="utf-8")
    groups = among(by_condition(records.read_all(folder)), lambda seed: seed not in fresh_seeds)
    if BASELINE in groups:
        plots.plot_differences(groups, picture)
        if has_learnt_kinds(groups):
            for kind, names in SHOWN_CURVES.items():
                plots.plot_curves(groups, kind, names, picture.with_name(f"{kind}.svg"))


def with_tables(document: str, folder: Path, begin: str, fresh_seeds: Sequence[int]) -> str:
    """The tables of the records in ``folder`` replace what stands between ``begin`` and the next end."""
    found = by_condition(records.read_all(folder))
    text = tables(found, records.read_all(folder / "tuning"), fresh_seeds)
    before, found_begin, rest = document.partition(begin)
    _, found_end, after = rest.partition(END)
    if not found_begin or not found_end:
        raise SystemExit(f"{DOCUMENT}: no section {begin} ... {END}")
    return f"{before}{begin}\n\n{text}\n{END}{after}"


def by_condition(found: Iterable[Record]) -> dict[str, list[Record]]:
    """In the order of the sweep."""
    grouped: dict[str, list[Record]] = {}
    for record in found:
        grouped.setdefault(record["condition"]["name"], []).append(record)
    return {name: grouped[name] for name in CONDITIONS if name in grouped}


def among(groups: Groups, wanted: Callable[[int], bool]) -> Groups:
    """The runs of these seeds, and the conditions that have some."""
    found = {name: [run for run in runs if wanted(run["seed"])] for name, runs in groups.items()}
    return {name: runs for name, runs in found.items() if runs}


def tables(groups: Groups, tuning: Sequence[Record], fresh_seeds: Sequence[int]) -> str:
    if not groups and not tuning:
        return "No run has been recorded yet.\n"
    parts = [_settings(tuning)] if tuning else []
    fresh = among(groups, lambda seed: seed in fresh_seeds)
    groups = among(groups, lambda seed: seed not in fresh_seeds)
    if groups:
        parts += [
            _accuracy(groups),
            changes(groups),
            _kinds(groups),
            learning(groups),
            _gradients(groups),
            confirmation(fresh),
        ]
    return "\n".join(part for part in parts if part)


def _settings(tuning: Sequence[Record]) -> str:
    found: dict[tuple[int, float], list[float]] = {}
    for record in tuning:
        last = validation_accuracy(record["validation"][-1])
        found.setdefault((record["steps"], record["learning_rate"]), []).append(last)
    rows = [
        [str(steps), f"{rate:g}", str(len(values)), f"{100 * statistics.fmean(values):.1f}"]
        for (steps, rate), values in sorted(found.items())
    ]
    head = ["steps", "learning rate", "seeds", "validation accuracy, %"]
    return "Student alone, settings compared on validation:\n\n" + _markdown(head, rows)


def _accuracy(groups: Groups) -> str:
    base = groups.get(BASELINE, [])
    head = ["condition", "what", "seeds", "accuracy, %", "minus alone [95 % interval]"]
    head += ["pairs", "steps to reach alone", "steps clipped, %", "CPU seconds"]
    rows = []
    for name, runs in groups.items():
        difference = None if name == BASELINE else paired_difference(runs, base)
        rows.append(
            [
                name,
                CONDITIONS[name].about,
                str(len(runs)),
                _mean(mean_accuracy(runs)),
                _difference(difference),
                "" if difference is None else str(difference.seeds),
                "" if name == BASELINE else _reached(runs, base),
                f"{100 * statistics.fmean(run['clipped'] for run in runs):.0f}",
                f"{statistics.median(run['seconds']['cpu'] for run in runs):.0f}",
            ]
        )
    return "Test accuracy, mean over kinds of question ± standard error over seeds:\n\n" + _markdown(
        head, rows
    )


def changes(groups: Groups) -> str:
    """Of the conditions that are another one with one thing changed."""
    rows = []
    for name, runs in groups.items():
        other = CONDITIONS[name].varies
        difference = paired_difference(runs, groups.get(other, [])) if other is not None else None
        if other is not None and difference is not None:
            rows.append([name, other, _difference(difference), str(difference.seeds)])
    head = ["condition", "minus", "difference [95 % interval]", "pairs"]
    return "What one change does, points of test accuracy:\n\n" + _markdown(head, rows) if rows else ""


def _kinds(groups: Groups) -> str:
    base = groups.get(BASELINE, [])
    kinds = next(iter(groups.values()))[0]["test"]
    rows = []
    for name, runs in groups.items():
        cells = []
        for kind in kinds:
            difference = None if name == BASELINE else paired_difference(runs, base, kind)
            cells.append(f"{100 * mean_accuracy(runs, kind).value:.1f} {_difference(difference)}".strip())
        rows.append([name, *cells])
    return "By kind of question, % (minus alone [95 % interval]):\n\n" + _markdown(
        ["condition", *kinds], rows
    )


def learning(groups: Groups) -> str:
    """When they are learnt; nothing of a task without these kinds, or without the student alone."""
    if not has_learnt_kinds(groups):
        return ""
    head = ["condition", "all kinds"]
    for kind in LEARNT_KINDS:
        head += [kind, f"{kind}: steps to {100 * curves.LEARNT:.0f} %"]
    return (
        "Validation accuracy averaged over the ten validations of a run, % (minus alone: mean ± standard "
        "error over seeds), and the median over seeds of the first validated step with 90 % of a kind right. "
        "Conditions that train as long as alone; the kind text is the sums:\n\n"
        + _markdown(head, curves.rows_of(groups, LEARNT_KINDS))
    )


def has_learnt_kinds(groups: Groups) -> bool:
    """Whether the student alone was asked them."""
    return BASELINE in groups and set(LEARNT_KINDS) <= groups[BASELINE][0]["test"].keys()


def confirmation(groups: Groups) -> str:
    """Of the fresh seeds."""
    if BASELINE not in groups:
        return ""
    seeds = [run["seed"] for run in groups[BASELINE]]
    return f"**Confirmation**, seeds {min(seeds)} to {max(seeds)}. {_accuracy(groups)}\n{learning(groups)}"


def _gradients(groups: Groups) -> str:
    """Of the condition with all terms."""
    shares = gradient_shares(groups.get("all", []))
    if not shares:
        return ""
    focus = CONDITIONS["all"].section().vision_focus_weight
    terms = list(dict.fromkeys(term for of_part in shares.values() for term in of_part))
    rows = [
        [part, *(_range(of_part[term]) if term in of_part else "" for term in terms)]
        for part, of_part in shares.items()
    ]
    return (
        f"Gradient norm of each term, at the weights of the run (lambda {focus:g}), over that of the labels, "
        "lowest to highest over training:\n\n" + _markdown(["part of the student", *terms], rows)
    )


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _mean(mean: Mean) -> str:
    error = "" if mean.standard_error is None else f" ± {100 * mean.standard_error:.1f}"
    return f"{100 * mean.value:.1f}{error}"


def _difference(paired: Paired | None) -> str:
    if paired is None:
        return ""
    # Of -0.0 the sign is an error of rounding, and 0.0 takes it away.
    value, low, high = (round(100 * one, 1) + 0.0 for one in (paired.value, paired.low, paired.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _range(bounds: tuple[float, float]) -> str:
    low, high = bounds
    return f"{low:.2g} to {high:.2g}"


def _reached(runs: Sequence[Record], base: Sequence[Record]) -> str:
    alone = {run["seed"]: run for run in base}
    found = [steps_to_reach(run, alone[run["seed"]]) for run in runs if run["seed"] in alone]
    steps = [one for one in found if one is not None]
    if not found:
        return ""
    return f"{statistics.median(steps):.0f} ({len(steps)} of {len(found)})" if steps else f"0 of {len(found)}"


if __name__ == "__main__":
    main()
