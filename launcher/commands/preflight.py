"""What is checked before anything is written or started. All problems come back together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from alignkd.config import Config
from alignkd.errors import UserError
from launcher.render.deepspeed import accumulation_steps
from launcher.run.folder import existing_run_problem, run_path


def launch_problems(config: Config, world_size: int, coming: Sequence[Path] = ()) -> list[str]:
    """Every reason not to start this run on ``world_size`` ranks (empty: none).

    ``coming`` are runs of earlier stages: models in them are not there yet, and are checked by the ranks.
    """
    problems = [problem for problem in [existing_run_problem(run_path(config))] if problem]
    problems += _data_problems(config)
    problems += _raised(lambda: accumulation_steps(config.training, world_size))
    read = [*_model_folders(config).values(), *([config.model.adapters] if config.model.adapters else [])]
    if not any(_is_in(folder, run) for folder in read for run in coming):
        problems += model_problems(config)
    return problems


def _data_problems(config: Config) -> list[str]:
    problems = []
    for index, source in enumerate(config.data.sources):
        key = f"data.sources[{index}]"
        problem = _unreadable(Path(source.file), "file")
        if problem:
            problems.append(f"{key}.file = {source.file}: {problem}; valid: a LLaVA-style JSON list")
        problem = None if source.image_folder is None else _unreadable(Path(source.image_folder), "folder")
        if problem:
            problems.append(f"{key}.image_folder = {source.image_folder}: {problem}")
    return problems


def _unreadable(path: Path, kind: Literal["file", "folder"]) -> str | None:
    try:
        found = path.is_file() if kind == "file" else path.is_dir()
    except OSError as error:  # a folder on the way may not be entered, a server does not answer
        return str(error.strerror)
    if not found:
        return f"no such {kind}"
    wanted = os.R_OK if kind == "file" else os.R_OK | os.X_OK
    return None if os.access(path, wanted) else "may not be read by this user"


def model_problems(config: Config) -> list[str]:
    """Missing model folders; else whether teacher and student speak of the same tokens and pixels."""
    from alignkd.models.agreement import check_agreement

    model = config.model
    named = _model_folders(config)
    missing = [
        f"{key} = {folder}: no such folder{_made_by(folder, config)}"
        for key, folder in named.items()
        if not Path(folder).is_dir()
    ]
    missing += _adapter_problems(config)
    if missing:
        return missing
    if not config.distillation.enabled:  # the student alone is looked at
        model = model.model_copy(update={"teacher": None})
    problems: list[str] = []
    problems += _raised(lambda: problems.extend(check_agreement(model, config.distillation.top_k)))
    return problems


def _made_by(folder: str, config: Config) -> str:
    """Which run will make a model that is missing."""
    runs = Path(config.run.folder)
    if runs not in Path(folder).parents:
        return ""
    run = Path(folder).relative_to(runs).parts[0]
    return f"; run {run} makes it at its end: launch that first, or both with --stages"


def _adapter_problems(config: Config) -> list[str]:
    if config.model.adapters is None or not config.distillation.enabled:
        return []
    path = Path(config.model.adapters)
    file = path / "adapters.safetensors" if path.is_dir() else path
    valid = "the folder of a run with distillation that is finished, or its adapters.safetensors"
    if file.is_file():
        return []
    missing = f"no file {file}" if path.is_dir() else f"no such file or folder{_made_by(str(path), config)}"
    return [f"model.adapters = {path}: {missing}; valid: {valid}"]


def _model_folders(config: Config) -> dict[str, str]:
    """Those that this configuration reads, by key."""
    model = config.model
    named = {
        "model.teacher": model.teacher if config.distillation.enabled else None,
        "model.student": None if model.student == "scratch" else model.student,
        "model.student_config": model.student_config if model.student == "scratch" else None,
        "model.vision_tower": model.vision_tower,
    }
    return {key: folder for key, folder in named.items() if folder is not None}


def _is_in(folder: str, run: Path) -> bool:
    return run in (Path(folder), *Path(folder).parents)


def _raised(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except UserError as error:
        return [str(error)]
    return []
