"""Several stages of one configuration: a run for each, which starts when the one before is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alignkd.errors import UserError
from alignkd.run_folder.atomic_files import read_json, write_json
from alignkd.run_folder.paths import RunPaths
from launcher.backends.slurm.client import ask, queued_jobs


def stage_names(stage: str | None, stages: str | None, name: str | None) -> list[str | None]:
    """What ``--stage`` and ``--stages a,b`` choose; ``[None]`` for a configuration without stages."""
    if stages is None:
        return [stage]
    names: list[str | None] = [part.strip() for part in stages.split(",") if part.strip()]
    if stage is not None:
        raise UserError("--stage and --stages: give one of them")
    if name is not None:
        raise UserError("--name is the name of one run; with --stages each stage has its own run.name")
    if not names or len(set(names)) < len(names):
        raise UserError(f"--stages {stages}: names of different stages, with commas between them")
    return names


def check_runs(names: Sequence[str | None], runs: Sequence[Path]) -> None:
    """Raises UserError when two stages would use one run folder."""
    for index, run in enumerate(runs):
        if run in runs[:index]:
            raise UserError(
                f"stages {names[runs.index(run)]} and {names[index]} have the same run.name; it must differ"
            )


def link(run: Path, following: Path) -> None:
    """Note which run waits for this one."""
    write_json(RunPaths(run).next_stage, {"run": str(following)})


def hand_on(run: Path, job: str) -> None:
    """The stage that waits for ``run`` waits for ``job`` now: a resumed or chained job is a new one."""
    following = (read_json(RunPaths(run).next_stage) or {}).get("run")
    for waiting in (queued_jobs(Path(following)) or []) if following else []:
        if waiting.state == "PENDING":
            ask("scontrol", "update", f"JobId={waiting.id}", f"Dependency=afterok:{job}")
