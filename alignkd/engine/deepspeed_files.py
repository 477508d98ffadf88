"""The DeepSpeed files of a run folder, which the launcher renders and a user may edit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkd.config.schema import Config
from alignkd.errors import UserError
from alignkd.models.json_file import read_json
from alignkd.run_folder.paths import RunPaths


@dataclass(frozen=True)
class DeepSpeedFiles:
    student: dict[str, Any]
    teacher: dict[str, Any] | None  # None when no teacher is sharded
    accumulation: int  # micro-batches of an optimizer step, from the student's file


def read_deepspeed_files(run: Path, config: Config) -> DeepSpeedFiles:
    """Raises UserError that names the file when it is missing or damaged."""
    paths = RunPaths(run)
    student = _read(paths.student_deepspeed)
    is_sharded = (
        config.distillation.enabled
        and config.model.teacher is not None
        and config.teacher.placement not in ("replicated", "cached")
    )
    teacher = _read(paths.teacher_deepspeed) if is_sharded else None
    return DeepSpeedFiles(student, teacher, _accumulation(paths.student_deepspeed, student))


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path}: no such file; `alignkd launch` writes it into every run folder")
    return read_json(path)


def _accumulation(path: Path, student: dict[str, Any]) -> int:
    steps = student.get("gradient_accumulation_steps")
    if not isinstance(steps, int) or steps < 1:
        raise UserError(f"{path}: gradient_accumulation_steps must be a positive integer, found {steps!r}")
    return steps
