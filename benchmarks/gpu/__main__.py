"""The first minutes on a GPU: ``python -m benchmarks.gpu``, or ``make gpu-check``.

The parts run one after another, each in a process of its own: one that fails or takes too long does not end
the rest. Results are written after every part, so that a run that is ended keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.gpu.parts import PARTS, Outcome, allowed_seconds, part_command, run_part
from benchmarks.gpu.rows import table

NAME = "gpu"


def main(arguments: list[str]) -> int:
    """The exit code: 0 when every part is done."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="end after so many (default: %(default)s)")
    parser.add_argument(
        "--parts", nargs="+", choices=names, default=names, metavar="PART", help=f"of {names}"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU: a test of this program")
    parser.add_argument(
        "--out",
        type=Path,
        help=f"write the results here (default: docs/performance/{NAME}.json; tiny: nowhere)",
    )
    parser.add_argument("--publish", action="store_true", help="write the tables into docs/performance.md")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="measure nothing: show or publish these earlier results"
    )
    options = parser.parse_args(arguments)
    if options.results is not None:
        document = json.loads(options.results.read_text(encoding="utf-8"))
        outcomes = [Outcome(**outcome) for outcome in document["results"]]
        _write(document["measured"], outcomes, options.out, options.publish)
        print(report.section(NAME, document["measured"], body(outcomes)))
        return 0
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here (--tiny runs every part on the CPU)")
    if options.tiny and options.publish:
        parser.error("--tiny measures nothing worth publishing")
    out = options.out
    if out is None and not options.tiny:
        report.FOLDER.mkdir(exist_ok=True)
        out = report.FOLDER / f"{NAME}.json"
    started = time.monotonic()
    measured = report.facts(arguments)
    parts = [part for part in PARTS if part.name in options.parts]
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="alignkd-gpu-") as folder:
        for number, part in enumerate(parts):
            allowed = allowed_seconds(parts, number, 60 * options.minutes, time.monotonic() - started)
            outcomes.append(run_part(part, part_command(part, options.tiny), allowed, Path(folder)))
            print(body(outcomes[-1:]), flush=True)
            _write(measured, outcomes, out, options.publish)
    return int(any(outcome.status != "done" for outcome in outcomes))


def body(outcomes: list[Outcome]) -> str:
    """A Markdown table per part, and what became of it."""
    sections = []
    for outcome in outcomes:
        lines = [f"**{outcome.title}** ({outcome.status}, {outcome.seconds:.0f} s)\n"]
        lines += [table(outcome.rows) + "\n"] if outcome.rows else []
        lines += [f"```\n{outcome.log}\n```\n"] if outcome.log else []
        sections.append("\n".join(lines))
    return "\n".join(sections)


def _write(measured: dict[str, Any], outcomes: list[Outcome], out: Path | None, publish: bool) -> None:
    results = [asdict(outcome) for outcome in outcomes]
    if out is not None:
        out.write_text(report.as_json(measured, results), encoding="utf-8")
    if publish:
        report.publish(NAME, measured, body(outcomes), results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
