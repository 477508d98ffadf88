"""``python -m alignkd.evaluate MODEL --data FILE.json --image-folder DIR [--json] [--out FILE]``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from alignkd.errors import AlignkdError, UserError, report_error
from alignkd.evaluate.accuracy import ALL_KINDS, Accuracy

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[Path, typer.Argument(help="Model folder in the MobileVLM V2 format.")],
    data: Annotated[
        Path, typer.Option(help="LLaVA-style JSON list; the last turn of an entry is the expected answer.")
    ],
    image_folder: Annotated[
        Path | None, typer.Option(help="Folder that image paths are relative to.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
) -> None:
    """Measure accuracy per kind of question, by greedy generation on the CPU."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before the folder module imports deepspeed
    from alignkd.evaluate.folder import evaluate_folder

    try:
        with _progress_bar() as bar:
            task = bar.add_task(f"answering with {model}", total=None)
            accuracy = evaluate_folder(
                model,
                data,
                image_folder,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except AlignkdError as error:
        raise typer.Exit(report_error(error)) from None
    text = json.dumps(accuracy.as_dict(), indent=1)
    if as_json:
        print(text)
    else:
        Console().print(accuracy_table(accuracy))
    if out is None:
        return
    try:
        out.write_text(text + "\n", encoding="utf-8")
    except OSError as error:  # the result, which may have taken hours, was printed
        raise typer.Exit(report_error(UserError(f"--out {out}: cannot be written ({error})"))) from None


def accuracy_table(accuracy: Accuracy) -> Table:
    table = Table(title="exact answers by greedy generation")
    table.add_column("kind of question")
    for column in ("accuracy", "majority baseline", "questions"):
        table.add_column(column, justify="right")
    for kind, row in [*accuracy.kinds.items(), (ALL_KINDS, accuracy.overall)]:
        table.add_row(kind, f"{row.accuracy:.3f}", f"{row.baseline:.3f}", str(row.count))
    return table


def _progress_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


if __name__ == "__main__":
    app()
