"""The end of a run: its exports, and ``result.json``, which says that everything else is there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from alignkd.checkpoint.export import export_adapters, export_engine
from alignkd.checkpoint.model_card import model_card
from alignkd.checkpoint.save import CheckpointSaver
from alignkd.engine.optimizer_step import peak_memory_bytes
from alignkd.engine.state import TrainingState, library_versions
from alignkd.errors import EXIT_OK, FileSystemError
from alignkd.models.agreement import student_folder
from alignkd.models.families.table import family_name
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.result import write_result


def finish_run(
    state: TrainingState,
    code: int,
    step: int,
    saver: CheckpointSaver,
    sync_rows: Callable[[], None],
    started: float,
    report: Callable[[str], None],
) -> None:
    """Write what a run leaves behind after ``step``, when training ends with the exit ``code``. Collective.

    ``report`` is told of each phase. Raises what :func:`finish_complete_run` raises.
    """
    status = "done" if code == EXIT_OK else "stopped"
    result = {
        "status": status,
        "step": step,
        "total_steps": state.total_steps,
        "saves": asdict(saver.totals),
        "peak_memory_bytes_per_rank": state.ranks.gather_objects(peak_memory_bytes()),
    }
    if code == EXIT_OK:
        report("exporting")
        saver.stop_unless_writer()  # whoever took over exports as well
        finish_complete_run(state, result, saver.newest, sync_rows, started)
    else:
        finish_stopped_run(state, result, started)
    report(status)


def finish_stopped_run(state: TrainingState, result: dict[str, Any], started: float) -> None:
    """Write the result of a run that was stopped and saved, on rank 0. Without room for it, the checkpoint is
    still there, and the exit code tells the launcher what to do next."""
    if state.ranks.is_first:
        with contextlib.suppress(OSError):
            write_result(state.run, {**result, "seconds": time.monotonic() - started})


def finish_complete_run(
    state: TrainingState,
    result: dict[str, Any],
    saved_step: int,
    sync_rows: Callable[[], None],
    started: float,
) -> None:
    """Export adapters and student, then write the result. Collective.

    ``saved_step``: the newest checkpoint. Raises FileSystemError on all ranks when a file cannot be written.
    """

    def write() -> None:
        sync_rows()
        write_result(state.run, {**result, "seconds": time.monotonic() - started})

    try:
        export_adapters(state.engine, state.run, state.ranks)
        family = family_name(student_folder(state.config.model))
        card = model_card(state.run, result["step"], asdict(state.identity), library_versions(), family)
        export_engine(state.engine, state.config, RunPaths(state.run).student, state.ranks, card)
        state.ranks.run_on_rank0(write)
    except FileSystemError as error:
        raise FileSystemError(
            f"{state.run}: all {state.total_steps} steps are done, but their result could not be written: "
            f"{error}\nFree some space, or fix what the message names; "
            f"`alignkd resume {state.run}` continues from step {saved_step}."
        ) from error
