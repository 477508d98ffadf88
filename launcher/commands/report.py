"""``alignkd report``: one HTML page about one run, or several side by side."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from alignkd.errors import UserError, raise_if_passing
from alignkd.run_folder.atomic_files import read_json, write_text_atomic
from launcher.commands.status import current_state
from launcher.report.answer_pictures import answer_pictures
from launcher.report.comparisons import differences
from launcher.report.evaluations import find_evaluations
from launcher.report.focus_pictures import focus_pictures
from launcher.report.page import MAX_RUNS, Report, render_page
from launcher.report.run_facts import Health, RunFacts, read_run_facts
from launcher.run.exit_codes import clean_lines, error_message


@dataclass(frozen=True)
class ReportRequest:
    runs: tuple[Path, ...]
    out: Path
    evaluations: tuple[Path, ...]  # folders of `alignkd eval --out`
    pictures: int = 0  # samples with attention, wrong answers and right answers of the first run, each
    device: Literal["auto", "cpu"] = "auto"  # of the models that are asked for their attention


def write_report(request: ReportRequest) -> None:
    """Raises UserError for folders that are no runs or no evaluations, and a page that cannot be written."""
    report = read_report(request.runs, request.evaluations)
    if request.pictures:
        report = with_pictures(report, request.pictures, request.device)
    page = render_page(report)
    try:
        request.out.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(request.out, page)
    except OSError as error:
        raise_if_passing(error, request.out)
        raise UserError(f"{request.out}: cannot be written: {error.strerror}") from None


def read_report(folders: Sequence[Path], outs: Sequence[Path]) -> Report:
    """What the page will show of these runs, with the evaluations in ``outs``. Raises UserError."""
    runs = _runs(folders)
    evaluations, unscored = find_evaluations(runs, [Path(os.path.abspath(out)) for out in outs])
    compared, not_compared = differences(evaluations)
    problems = (*unscored, *not_compared)
    return Report(tuple(runs), tuple(evaluations), tuple(compared), problems, datetime.now(UTC))


def with_pictures(report: Report, count: int, device: Literal["auto", "cpu"]) -> Report:
    """Attention and answers of the first run; a problem of the page where there are none."""
    problems, focus, answers = list(report.problems), [], []
    try:
        focus = focus_pictures(_attention_maps(report.runs[0].folder, count, device))
    except UserError as error:
        problems.append(f"no attention maps: {error}")
    try:
        answers = answer_pictures(report.evaluations, count)
    except UserError as error:
        problems.append(f"no answers with images: {error}")
    return replace(report, focus=tuple(focus), answers=tuple(answers), problems=tuple(problems))


def _attention_maps(run: Path, count: int, device: str) -> dict[str, Any]:
    """From a process of its own: it imports torch, and may use a GPU. Raises UserError with its message."""
    with tempfile.TemporaryDirectory(prefix="alignkd-report-") as folder:
        out = Path(folder) / "maps.json"
        command = [sys.executable, "-m", "alignkd.report", str(run), str(out)]
        command += ["--samples", str(count), "--device", device]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
        maps = read_json(out)
        if done.returncode != 0 or maps is None:
            lines = clean_lines(done.stderr) or [f"exit code {done.returncode}"]
            raise UserError(error_message(lines) or lines[-1])
        return maps


def _runs(folders: Sequence[Path]) -> list[RunFacts]:
    places = [Path(os.path.abspath(folder)) for folder in folders]
    if len(set(places)) < len(places):
        raise UserError("a run is given twice; name each once")
    if len(places) > MAX_RUNS:
        raise UserError(f"{len(places)} runs are given; one page shows at most {MAX_RUNS}")
    return [
        replace(read_run_facts(place, _health(place)), name=_short_name(place, places)) for place in places
    ]


def _short_name(place: Path, places: Sequence[Path]) -> str:
    """The last parts of the path, as many as no other of ``places`` ends with."""
    for depth in range(1, len(place.parts)):
        tail = place.parts[-depth:]
        if sum(one.parts[-depth:] == tail for one in places) == 1:
            return "/".join(tail)
    return str(place)


def _health(run: Path) -> Health:
    state = current_state(run)
    return Health(
        str(state.state),
        state.detail,
        state.step,
        state.total_steps,
        state.reasons,
        state.attempts,
        state.lost_steps,
        state.goodput,
        state.slow_ranks,
        state.best,
    )
