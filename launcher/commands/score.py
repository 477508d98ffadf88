"""``alignkd eval --score`` and ``--check``: what needs no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from alignkd.errors import UserError
from alignkd.evaluate import score_report
from alignkd.evaluate.answers import read_answers
from alignkd.evaluate.report import notes_of
from alignkd.evaluate.scoring import check_data, score_file
from alignkd.evaluate.tasks import mmbench
from alignkd.evaluate.tasks.task import Task


def show_check(tasks: Sequence[Task], data: Path, *, as_json: bool) -> None:
    """Print the number of questions of each task, once all files and pictures are there."""
    counts = check_data(tasks, data)
    lines = [f"{name}: {number:,} questions" for name, number in counts.items()]
    print(json.dumps(counts) if as_json else "\n".join(lines))


def show_scores(
    tasks: Sequence[Task],
    files: Sequence[Path],
    data: Path,
    upload: Path | None,
    console: Console,
    *,
    as_json: bool,
) -> None:
    """Print the score of one answer file, or the scores of two with their comparison."""
    if len(tasks) != 1 or len(files) > 2:
        raise UserError("--score takes one or two answer files of one task; valid: --task pope --score FILE")
    task = tasks[0]
    if len(set(files)) < len(files):
        raise UserError(f"--score {files[0]}: given twice; a comparison needs two different files")
    scores = [[score_file(task, file, data)] for file in files]
    if upload is not None:
        if task is not mmbench.TASK or len(files) > 1:
            raise UserError(
                f"--upload: only mmbench has an upload file, of one --score FILE, not {task.name}"
            )
        mmbench.write_upload_file(data, read_answers(files[0]), upload)
    first, *others = scores
    comparisons = score_report.compare(first, others[0]) if others else []
    if as_json:
        report = score_report.as_json(first)
        if others:
            report["other"] = score_report.as_json(others[0])
            report["comparison"] = [score_report.comparison_json(found) for found in comparisons]
        print(json.dumps(report))
        return
    names = names_of(files)
    console.print(score_report.paper_table(dict(zip(names, scores, strict=True))))
    for table in score_report.category_tables(first[0]):
        console.print(table)
    if others:
        console.print(score_report.comparison_table(names[0], names[1], comparisons))
    for note in notes_of(dict(zip(names, scores, strict=True))):
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def names_of(files: Sequence[Path]) -> list[str]:
    """How a report calls answer files: by their names, or their folders (a model's, say) where those are
    equal."""
    for names in ([file.stem for file in files], [file.parent.name for file in files]):
        if all(names) and len(set(names)) == len(files):
            return names
    return [str(file) for file in files]
