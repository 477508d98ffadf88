"""Models that an earlier stage of the same file has yet to train: their shapes are known already.

Training changes no shape, so what a run will export has that of the model it starts from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alignkd.config import Config
from alignkd.models.agreement import student_folder
from launcher.run.folder import run_path


def described_by(folder: Path, tower: str | None, stages: Sequence[Config]) -> tuple[Path, str | None]:
    """The folder that has the ``config.json`` of a model, and the one that has its tower's (None: the same).

    Both are as given unless a run of ``stages`` will make them.
    """
    if tower is not None:
        tower = str(_tower_folder(Path(tower), stages))
    maker = _maker(folder, stages)
    if maker is None:
        return folder, tower
    before = [stage for stage in stages if stage is not maker]
    known, own_tower = described_by(student_folder(maker.model), maker.model.vision_tower, before)
    return known, tower or own_tower


def upstream_notes(config: Config, stages: Sequence[Config]) -> list[str]:
    """What is not there yet, and which run will make it."""
    model = config.model
    folders = {"model.student": str(student_folder(model)), "model.vision_tower": model.vision_tower}
    if config.distillation.enabled:
        folders["model.teacher"] = model.teacher
    notes = []
    for key, folder in folders.items():
        maker = None if folder is None else _maker(Path(folder), stages)
        if folder is not None and maker is not None:
            is_tower = key == "model.vision_tower"
            known = (
                _tower_folder(Path(folder), stages)
                if is_tower
                else described_by(Path(folder), None, stages)[0]
            )
            notes.append(
                f"{key} = {folder} is not there yet: run {maker.run.name} will make it, in the shape of "
                f"{known}"
            )
    return notes


def _tower_folder(folder: Path, stages: Sequence[Config]) -> Path:
    """A folder that has the tower's configuration, or is a model's that names it."""
    maker = _maker(folder, stages)
    if maker is None:
        return folder
    start = maker.model.vision_tower or str(student_folder(maker.model))
    return _tower_folder(Path(start), [stage for stage in stages if stage is not maker])


def _maker(folder: Path, stages: Sequence[Config]) -> Config | None:
    """The stage in whose run folder a model will be; None when it is there, or nobody makes it."""
    if (folder / "config.json").exists():
        return None
    return next((stage for stage in stages if run_path(stage) in folder.parents), None)
