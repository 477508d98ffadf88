"""Models that an upstream stage of the same configuration has yet to train: their shapes are known already.

Training changes no shape, so a run exports a model of the same shape as the one it starts from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alignkd.config import Config
from alignkd.models.agreement import student_folder
from launcher.run.folder import run_path


def config_folders(folder: Path, tower: str | None, stages: Sequence[Config]) -> tuple[Path, str | None]:
    """The folders with the ``config.json`` of a model and of its vision tower (None: the same folder).

    These are ``folder`` and ``tower``. Where a run of ``stages`` has yet to write one, it is the folder that
    the run starts from.
    """
    if tower is not None:
        tower = str(_tower_folder(Path(tower), stages))
    upstream = _upstream_stage(folder, stages)
    if upstream is None:
        return folder, tower
    others = [stage for stage in stages if stage is not upstream]
    start, own_tower = config_folders(student_folder(upstream.model), upstream.model.vision_tower, others)
    return start, tower or own_tower


def upstream_notes(config: Config, stages: Sequence[Config]) -> list[str]:
    """One line for each model that does not exist yet: which run will write it, and in which shape."""
    model = config.model
    folders = {"model.student": str(student_folder(model)), "model.vision_tower": model.vision_tower}
    if config.distillation.enabled:
        folders["model.teacher"] = model.teacher
    notes = []
    for key, name in folders.items():
        folder = None if name is None else Path(name)
        upstream = None if folder is None else _upstream_stage(folder, stages)
        if folder is None or upstream is None:
            continue
        is_tower = key == "model.vision_tower"
        start = _tower_folder(folder, stages) if is_tower else config_folders(folder, None, stages)[0]
        notes.append(
            f"{key} = {name} does not exist yet; run {upstream.run.name} will write it, in the shape of "
            f"{start}"
        )
    return notes


def _tower_folder(folder: Path, stages: Sequence[Config]) -> Path:
    """A folder with the tower's configuration, or one of a model that names its tower."""
    upstream = _upstream_stage(folder, stages)
    if upstream is None:
        return folder
    start = upstream.model.vision_tower or str(student_folder(upstream.model))
    return _tower_folder(Path(start), [stage for stage in stages if stage is not upstream])


def _upstream_stage(folder: Path, stages: Sequence[Config]) -> Config | None:
    """The stage whose run will write a model to ``folder``; None when it exists, or no stage writes it."""
    if (folder / "config.json").exists():
        return None
    return next((stage for stage in stages if run_path(stage) in folder.parents), None)
