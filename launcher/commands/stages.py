"""Several stages of one configuration: a run for each, which starts when the previous one is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alignkd.errors import UserError
from alignkd.run_folder.atomic_files import write_json
from alignkd.run_folder.paths import RunPaths


def stage_names(stage: str | None, stages: str | None, name: str | None) -> list[str | None]:
    """The stages that ``--stage`` or ``--stages a,b`` choose; ``[None]``: the configuration has none."""
    if stages is None:
        return [stage]
    names: list[str | None] = [part.strip() for part in stages.split(",") if part.strip()]
    if stage is not None:
        raise UserError("--stage and --stages: give only one of them")
    if name is not None:
        raise UserError("--name names a single run; with --stages each stage has its own run.name")
    if not names or len(set(names)) < len(names):
        raise UserError(f"--stages {stages}: needs the names of different stages, separated by commas")
    return names


def check_runs(names: Sequence[str | None], runs: Sequence[Path]) -> None:
    """Raises UserError when two stages would use one run folder."""
    for index, run in enumerate(runs):
        if run in runs[:index]:
            raise UserError(
                f"stages {names[runs.index(run)]} and {names[index]} have the same run.name; it must differ"
            )


def link(run: Path, following: Path) -> None:
    """Record in both runs that ``following`` waits for ``run``."""
    write_json(RunPaths(run).next_stage, {"run": str(following)})
    write_json(RunPaths(following).previous_stage, {"run": str(run)})
