"""``alignkd report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from launcher.cli.framework import Commands

reports = Commands()


@reports.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Run folders; the others are shown beside the first.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="HTML file to write.")] = Path("report.html"),
    evaluations: Annotated[
        list[Path] | None,
        typer.Option(
            "--eval",
            metavar="DIR",
            help="Answers of `alignkd eval --out DIR`; repeatable.",
            show_default="RUN/eval",
        ),
    ] = None,
    pictures: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            max=50,
            help="Show attention on N images of the run's data, and N wrong and right answers.",
        ),
    ] = 0,
    device: Annotated[
        Literal["auto", "cpu"],
        typer.Option(metavar="NAME", help="Of --pictures: auto (a GPU if there is one) or cpu."),
    ] = "auto",
) -> None:
    """Write one page: did the student get better, and why.

    Several runs are shown side by side, with the configuration keys in which they differ.
    """
    from launcher.commands.report import ReportRequest, write_report

    write_report(ReportRequest(tuple(runs), out, tuple(evaluations or ()), pictures, device))
    print(f"wrote {out}")
