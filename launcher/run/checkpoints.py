"""``alignkd ckpt``: which checkpoints a run has, and whether their files are what was written. No torch."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from alignkd.config import load_run_config
from alignkd.config.combinations import listed
from alignkd.config.dotted import did_you_mean, flatten
from alignkd.errors import UserError
from alignkd.run_folder.atomic_files import write_json, write_text_atomic
from alignkd.run_folder.checkpoints import (
    MANIFEST,
    MARKER,
    SET_ASIDE,
    committed_steps,
    differences,
    read_manifest,
    step_name,
    universal_name,
)
from alignkd.run_folder.drift import allowed_changes, saved_stage
from alignkd.run_folder.paths import RunPaths

IN_DEEPSPEED_FILES = (
    "student.offload",
    "student.zero_stage",
    "training.global_batch_size",
    "training.max_gradient_norm",
    "training.micro_batch_size",
    "training.precision",
)


@dataclass(frozen=True)
class CheckpointFacts:
    """``state`` is "committed", "verified", "not committed" or "broken"; ``problems`` says why. What is made
    from a checkpoint or was put out of the way shows it in its name: ``.universal``, ``.set-aside``."""

    name: str
    step: int | None
    state: str
    world_size: int | None
    zero_stage: int | None
    bytes: int
    problems: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def list_checkpoints(
    run: Path, verify: bool, progress: Callable[[str], None] = lambda _name: None
) -> list[CheckpointFacts]:
    """All checkpoints of a run, oldest first; ``verify`` hashes every file. UserError for another folder."""
    if not RunPaths(run).config.is_file():
        raise UserError(f"{run}: not a run folder (no config.yaml)")
    folders = [path for path in RunPaths(run).checkpoints.glob("step-*") if path.is_dir()]
    facts = []
    for folder in sorted(folders, key=_order):
        progress(folder.name)
        facts.append(_facts(folder, verify))
    return facts


def checkpoint_table(facts: list[CheckpointFacts]) -> Table:
    table = Table()
    for column in ("checkpoint", "state", "ranks", "ZeRO stage", "MB"):
        table.add_column(column, justify="left" if column in ("checkpoint", "state") else "right")
    for row in facts:
        state = row.state if not row.problems else f"{row.state}: {row.problems[0]}"
        table.add_row(
            row.name, state, _shown(row.world_size), _shown(row.zero_stage), f"{row.bytes / 1e6:.1f}"
        )
    return table


def check_changes(run: Path, keys: Sequence[str]) -> None:
    """Raises UserError for a key that is unknown, or fixed in the run's DeepSpeed files."""
    known = flatten(load_run_config(RunPaths(run).config).model_dump()) if keys else {}
    for key in keys:
        if key in IN_DEEPSPEED_FILES:
            raise UserError(
                f"--allow-change {key}: is fixed in the run's DeepSpeed files; start a new run for it"
            )
        if key not in known:
            raise UserError(f"--allow-change {key}: no such key{did_you_mean(key, known)}")


@contextlib.contextmanager
def changes_allowed(run: Path, keys: Sequence[str]) -> Iterator[None]:
    """Note that these keys may differ from the checkpoint's; taken back when what follows fails."""
    path = RunPaths(run).allowed_changes
    before = allowed_changes(run) if path.exists() else None
    if keys:
        write_json(path, sorted({*(before or []), *keys}))
    try:
        yield
    except BaseException:
        if keys and before is not None:
            write_json(path, before)
        elif keys:
            path.unlink(missing_ok=True)
        raise


def step_of(run: Path, step: int | None) -> int:
    """``step``, or the newest one. UserError when there is no such checkpoint."""
    if not RunPaths(run).config.is_file():
        raise UserError(f"{run}: not a run folder (no config.yaml)")
    steps = committed_steps(run)
    if not steps:
        raise UserError(f"{run}: has no checkpoint yet")
    if step is not None and step not in steps:
        raise UserError(f"--step {step}: {run} has no such checkpoint; valid: {listed(sorted(steps))}")
    return steps[0] if step is None else step


def check_step(run: Path, step: int) -> None:
    """Hash the checkpoint that a user wants to go back to. UserError when it is not there or not whole."""
    step_of(run, step)
    facts = _facts(RunPaths(run).checkpoints / step_name(step), verify=True)
    if facts.problems:
        raise UserError(f"--step {step}: {step_name(step)} is broken: {'; '.join(facts.problems[:3])}")


@contextlib.contextmanager
def rollback_to(run: Path, step: int | None) -> Iterator[list[str]]:
    """Make the next start resume from ``step`` (None: from the newest checkpoint).

    Newer checkpoints are kept under the names that are yielded; renamed back by hand they count again. The
    result of a finished run is removed; the start itself cuts the metrics rows after the step. Everything is
    undone when the body raises.
    """
    moved = [] if step is None else _set_aside(run, step)
    result = RunPaths(run).result
    text = result.read_text(encoding="utf-8") if step is not None and result.exists() else None
    if text is not None:
        result.unlink()
    try:
        yield [place.name for _, place in moved]
    except BaseException:
        if not any(folder.exists() for folder, _ in moved):  # else it did start, and has come further
            for folder, place in moved:
                place.rename(folder)
            if text is not None and not result.exists():
                write_text_atomic(result, text)
        raise


def _set_aside(run: Path, step: int) -> list[tuple[Path, Path]]:
    """Rename the checkpoints after ``step``, the newest first: (before, after)."""
    parent = RunPaths(run).checkpoints
    moved = []
    for newer in [other for other in committed_steps(run) if other > step]:
        folder = parent / step_name(newer)
        shutil.rmtree(parent / universal_name(newer), ignore_errors=True)  # can be made again
        number, place = 1, parent / (folder.name + SET_ASIDE)
        while place.exists():
            number += 1
            place = parent / f"{folder.name}{SET_ASIDE}-{number}"
        folder.rename(place)
        moved.append((folder, place))
    return moved


def _facts(folder: Path, verify: bool) -> CheckpointFacts:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    committed = (folder / MARKER).is_file()
    step: int | None = None
    world_size: int | None = None
    stage: int | None = None
    try:
        manifest = read_manifest(folder)
        files = manifest["files"]
        step, world_size = int(manifest["step"]), int(manifest["world_size"])
        stage = saved_stage(manifest) if "config" in manifest else int(manifest["zero_stage"])
        problems = differences(folder, files, sorted(files) if verify else [])
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems = [f"{MANIFEST} cannot be read ({error})"]
    if not committed:
        return CheckpointFacts(folder.name, step, "not committed", world_size, stage, size)
    state = "broken" if problems else "verified" if verify else "committed"
    return CheckpointFacts(folder.name, step, state, world_size, stage, size, tuple(problems))


def _order(folder: Path) -> tuple[int, str]:
    digits = folder.name.removeprefix("step-").split(".")[0]
    return (int(digits) if digits.isdigit() else -1, folder.name)


def _shown(value: int | None) -> str:
    return "?" if value is None else str(value)
