"""The command that scores answers to the public benchmarks: eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from alignkd.errors import UserError
from launcher.cli.options import Json

evaluations = typer.Typer(rich_markup_mode=None)


@evaluations.command("eval")
def evaluate(
    tasks: Annotated[
        str,
        typer.Option(
            "--task",
            "--tasks",
            metavar="NAME,...",
            help="Benchmarks: gqa, sqa, textvqa, pope, mme, mmbench, or all; own for your own questions.",
        ),
    ],
    data: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the benchmarks' published files.")],
    score: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Score these answers (JSONL); given twice, compare the two."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check that all files and images are there.")
    ] = False,
    questions: Annotated[
        str | None, typer.Option(metavar="FILE", help="Question file of task own, below DIR.")
    ] = None,
    image_folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Images of task own.", show_default="beside FILE")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Metric of task own: exact, vqa, letter, yes-no.", show_default="exact"
        ),
    ] = None,
    upload: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write MMBench's upload file (.tsv, .xlsx) as well.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score answers by the official rules of the public benchmarks."""
    from rich.console import Console

    from alignkd.evaluate import score_report
    from alignkd.evaluate.answers import read_answers
    from alignkd.evaluate.scoring import check_data, score_file
    from alignkd.evaluate.tasks import mmbench
    from alignkd.evaluate.tasks.own import own_task
    from alignkd.evaluate.tasks.registry import tasks_named

    if (questions is None) != (tasks != "own"):
        raise UserError("--task own (alone) and --questions FILE go together")
    if questions is None and (metric is not None or image_folder is not None):
        raise UserError("--metric and --image-folder are only for --task own")
    if questions is None:
        chosen = tasks_named(tasks)
    else:
        chosen = [own_task(data / questions, image_folder, metric or "exact")]
    if check == bool(score):
        raise UserError("give either --check or --score FILE")
    if check and upload is not None:
        raise UserError("--upload needs --score FILE")
    if check:
        counts = check_data(chosen, data)
        print(
            json.dumps(counts)
            if as_json
            else "\n".join(f"{name}: {n:,} questions" for name, n in counts.items())
        )
        return
    if len(chosen) != 1 or len(score or ()) > 2:
        raise UserError("--score takes one or two answer files of one task; valid: --task pope --score FILE")
    task, files = chosen[0], score or []
    if len(set(files)) < len(files):
        raise UserError(f"--score {files[0]}: given twice; a comparison needs two different files")
    scores = [[score_file(task, file, data)] for file in files]
    if upload is not None:
        if task is not mmbench.TASK or len(files) > 1:
            raise UserError(
                f"--upload: only mmbench has an upload file, of one --score FILE, not {task.name}"
            )
        mmbench.write_upload_file(data, read_answers(files[0]), upload)
    console, names = Console(), [file.stem for file in files]
    first, *others = scores
    comparisons = score_report.compare(first, others[0]) if others else []
    if as_json:
        report = score_report.as_json(first)
        if others:
            report["other"] = score_report.as_json(others[0])
            report["comparison"] = [score_report.comparison_json(found) for found in comparisons]
        print(json.dumps(report))
        return
    console.print(score_report.paper_table(dict(zip(names, scores, strict=True))))
    for table in score_report.category_tables(first[0]):
        console.print(table)
    if others:
        console.print(score_report.comparison_table(names[0], names[1], comparisons))
    for note in first[0].notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
