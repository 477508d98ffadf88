"""What a folder given as a model is: an export or public model, a GGUF export, or a run. Without torch."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from alignkd.errors import CheckpointError, UserError
from alignkd.export.gguf_names import MMPROJ, TEXT
from alignkd.run_folder.checkpoints import committed_steps
from alignkd.run_folder.paths import RunPaths


class FolderKind(Enum):
    MODEL = "a model folder"
    GGUF = "an export for llama.cpp"
    CHECKPOINT = "a run, with a checkpoint"
    FINISHED_RUN = "a run without checkpoints, but with its exported student"


def folder_kind(folder: Path, step: int | None = None) -> FolderKind:
    """Raises UserError for a folder that is neither, and for a ``step`` that cannot be meant."""
    if RunPaths(folder).config.is_file():
        steps = committed_steps(folder)
        if step is not None and step not in steps:
            there = f"there are {', '.join(map(str, sorted(steps)))}" if steps else "there is none"
            raise CheckpointError(f"{folder}: no checkpoint of step {step}; {there}")
        if steps:
            return FolderKind.CHECKPOINT
        if (RunPaths(folder).student / "config.json").is_file():
            return FolderKind.FINISHED_RUN
        raise CheckpointError(f"{folder}: the run has no checkpoint yet")
    for name, kind in {"config.json": FolderKind.MODEL, TEXT: FolderKind.GGUF}.items():
        if (folder / name).is_file():
            if step is not None:
                raise UserError(f"{folder}: --step {step} is for a run folder; this is {kind.value}")
            if kind is FolderKind.GGUF and not (folder / MMPROJ).is_file():
                raise UserError(f"{folder}: {MMPROJ} is missing beside {TEXT}")
            return kind
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a model is a model folder, a GGUF export or a run folder")
    raise UserError(
        f"{folder}: neither a model folder (config.json, or {TEXT}) nor a run folder (config.yaml)"
    )
