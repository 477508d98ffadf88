"""``alignkd report``: one HTML page about one run, or several side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from alignkd.errors import UserError, raise_if_passing
from alignkd.run_folder.atomic_files import write_text_atomic
from launcher.commands.status import current_state
from launcher.report.comparisons import differences
from launcher.report.evaluations import find_evaluations
from launcher.report.page import MAX_RUNS, Report, render_page
from launcher.report.run_facts import Health, RunFacts, read_run_facts


@dataclass(frozen=True)
class ReportRequest:
    runs: tuple[Path, ...]
    out: Path
    evaluations: tuple[Path, ...]  # folders of `alignkd eval --out`


def write_report(request: ReportRequest) -> None:
    """Raises UserError for folders that are no runs or no evaluations, and a page that cannot be written."""
    page = render_page(read_report(request.runs, request.evaluations))
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


def _runs(folders: Sequence[Path]) -> list[RunFacts]:
    places = [Path(os.path.abspath(folder)) for folder in folders]
    if len(set(places)) < len(places):
        raise UserError("a run is given twice; name each once")
    if len(places) > MAX_RUNS:
        raise UserError(f"{len(places)} runs are given; one page shows at most {MAX_RUNS}")
    return [read_run_facts(place, _health(place)) for place in places]


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
    )
