"""What the page says of one run, from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkd.config.yaml_reader import read_yaml
from alignkd.errors import UserError
from alignkd.run_folder.atomic_files import read_json
from alignkd.run_folder.best import Best
from alignkd.run_folder.metrics import iter_rows
from alignkd.run_folder.paths import RunPaths
from launcher.report.columns import Columns, read_columns
from launcher.report.terms import Term, terms_of
from launcher.report.times import TimeParts, time_parts
from launcher.run.attempts import last_sign, open_attempt, read_history
from launcher.run.manifest import Manifest, read_manifest


@dataclass(frozen=True)
class Health:
    """As `alignkd status` shows it."""

    state: str
    detail: str
    step: int
    total_steps: int | None
    reasons: tuple[str, ...]  # why the closed attempts ended
    attempts: int
    lost_steps: int
    goodput: float | None
    slow_ranks: tuple[str, ...]
    best: Best | None = None  # the checkpoint with the best value of evaluation.best


@dataclass(frozen=True)
class RunFacts:
    name: str
    folder: Path
    manifest: Manifest
    config: Mapping[str, Any]
    health: Health
    columns: Columns
    terms: tuple[Term, ...]
    times: TimeParts | None
    peak_memory: tuple[float, ...]  # bytes, by rank; empty until the run has ended

    @property
    def skipped_steps(self) -> int:
        return int(max(self.columns.values("skipped_steps"), default=0))

    @property
    def skipped_samples(self) -> int:
        return int(sum(self.columns.values("skipped_samples")))

    @property
    def not_finite(self) -> int:
        """Rows without a finite loss."""
        return self.columns.rows - len(self.columns.values("loss"))

    def model_folder(self, key: str) -> Path | None:
        """The folder that ``model.KEY`` names; None where there is none to load."""
        section = self.config.get("model")
        found = section.get(key) if isinstance(section, Mapping) else None
        return Path(found) if isinstance(found, str) and found != "scratch" else None


def read_run_facts(run: Path, health: Health) -> RunFacts:
    """Raises UserError when the folder is not a run, or its configuration cannot be read."""
    paths = RunPaths(run)
    config = read_yaml(paths.config)
    if not isinstance(config, dict):
        raise UserError(f"{paths.config}: must be a mapping")
    columns = read_columns(iter_rows(paths.metrics))
    result = read_json(paths.result) or {}
    history, current = read_history(run), open_attempt(run)
    attempts = [*history, current] if current else history
    sign = last_sign(run, current) if current else None
    memory = result.get("peak_memory_bytes_per_rank")
    return RunFacts(
        run.name,
        run,
        read_manifest(run),
        config,
        health,
        columns,
        tuple(terms_of(columns, config)),
        time_parts(iter_rows(paths.metrics), attempts, sign, result),
        tuple(float(one) for one in memory if isinstance(one, int | float))
        if isinstance(memory, list)
        else (),
    )
