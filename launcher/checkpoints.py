"""``alignkd ckpt``: which checkpoints a run has, and whether their files are what was written. No torch."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from alignkd.checkpoint.drift import ALLOWED_CHANGES, flatten
from alignkd.checkpoint.layout import (
    MANIFEST,
    MARKER,
    checkpoints_folder,
    differences,
    read_manifest,
)
from alignkd.config import load_config
from alignkd.errors import UserError
from launcher.files import write_json

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
    """``state`` is "committed", "verified", "not committed" or "broken"; ``problems`` says why."""

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
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: not a run folder (no config.yaml)")
    folders = [path for path in checkpoints_folder(run).glob("step-*") if path.is_dir()]
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


def allow_changes(run: Path, keys: list[str]) -> None:
    """Note that these keys may differ from the checkpoint's. Raises UserError for an unknown key."""
    known = flatten(load_config(run / "config.yaml").model_dump())
    for key in keys:
        if key in IN_DEEPSPEED_FILES:
            raise UserError(
                f"--allow-change {key}: is fixed in the run's DeepSpeed files; start a new run for it"
            )
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"--allow-change {key}: no such key{meant}")
    path = run / ALLOWED_CHANGES
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    write_json(path, sorted({*before, *keys}))


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
        stage = int(manifest["config"]["student"]["zero_stage"])
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
