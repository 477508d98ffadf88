"""Write the trained student as a model folder, from a run's live engine or later from a checkpoint.

The adapters serve training only: they are not part of it, but go into a file of their own for the next stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignkd.checkpoint.model_card import model_card
from alignkd.config import load_run_config
from alignkd.config.schema import Config, LoraSection, ModelSection
from alignkd.distributed.ranks import Ranks
from alignkd.errors import CheckpointError, FileSystemError, UserError
from alignkd.models.adapters import save_adapters
from alignkd.models.agreement import student_folder
from alignkd.models.building import DTYPES, full_tensors
from alignkd.models.families.table import family_name
from alignkd.models.lora import merged
from alignkd.models.saving import FileFormat
from alignkd.models.student_export import save_lora, save_student
from alignkd.run_folder.checkpoints import committed_steps, read_manifest, step_folder
from alignkd.run_folder.drift import saved_stage
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.verification import problems_of

STUDENT_PREFIX = "student."
ADAPTERS_PREFIX = "adapters."


def export_engine(engine: Any, config: Config, out: Path, ranks: Ranks, card: str | None = None) -> None:
    """Write the engine's student weights in the training precision, with ``card`` as README.md. Collective;
    rank 0 writes. Raises FileSystemError on every rank when it cannot; an older ``out`` stays in place."""
    tensors = {}
    for name, value in full_tensors(engine.module.student):
        if ranks.is_first:
            tensors[name] = value.detach().cpu().clone()

    lora = config.student.lora

    def save() -> None:
        whole = tensors if lora is None else merged(tensors, lora)
        # A finished run that is resumed exports again.
        save_student(out, config.model, whole, replace=True, card=card)

    ranks.run_on_rank0(save)


def export_adapters(engine: Any, run: Path, ranks: Ranks) -> None:
    """Write the engine's P_attn and P_V for the next stage, if it has them. Collective; rank 0 writes.

    They go into the run's folder, not into the student's, whose format is the published one.
    """
    adapters = engine.module.adapters
    if adapters is None:
        return
    tensors = {}
    for name, value in full_tensors(adapters):
        if ranks.is_first:
            tensors[name] = value.detach().cpu().clone()
    ranks.run_on_rank0(lambda: save_adapters(RunPaths(run).adapters, tensors))


def export_run(run: Path, out: Path, step: int | None, file_format: FileFormat) -> int:
    """Write the student of a checkpoint (the newest by default) to ``out``, in one process, without a GPU.

    Returns the step. Raises UserError when ``out`` exists, the step does not, or its files have changed,
    FileSystemError when ``out`` cannot be written.
    """
    if out.exists():
        raise UserError(f"{out} exists; name a folder that does not exist")
    saved = saved_student(run, step)
    card = model_card(
        run, saved.step, saved.manifest, saved.manifest["versions"], family_name(student_folder(saved.model))
    )
    try:
        save_student(out, saved.model, saved.tensors, file_format, card=card)
    except OSError as error:
        raise FileSystemError(f"{out}: could not be written: {error}") from error
    return saved.step


def export_lora(run: Path, out: Path, step: int | None) -> int:
    """Write the LoRA adapters of a checkpoint alone, as a folder that peft loads. Returns the step; raises
    what :func:`export_run` raises, and UserError for a run that has trained something else."""
    config = load_run_config(RunPaths(run).config) if RunPaths(run).config.is_file() else None
    if config is not None and (
        config.student.lora is None
        or config.student.train != ["language_model"]
        or config.training.train_vision_tower
    ):
        raise UserError(
            f"{run}: adapters alone are its student only with student.lora, student.train = [language_model] "
            "and training.train_vision_tower = false; valid here: --format safetensors"
        )
    if out.exists():
        raise UserError(f"{out} exists; name a folder that does not exist")
    saved = saved_student(run, step, merge=False)
    assert saved.lora is not None, "checked above"
    try:
        save_lora(out, saved.model, saved.lora, saved.tensors)
    except OSError as error:
        raise FileSystemError(f"{out}: could not be written: {error}") from error
    return saved.step


@dataclass(frozen=True)
class SavedStudent:
    """The student in a checkpoint of a run."""

    step: int
    manifest: dict[str, Any]
    model: ModelSection
    tensors: dict[str, torch.Tensor]  # our names, in the training precision
    adapters: dict[str, torch.Tensor]  # of P_attn and P_V, in the training precision; empty without a teacher
    lora: LoraSection | None


def saved_student(run: Path, step: int | None, *, merge: bool = True) -> SavedStudent:
    """Read the student of a checkpoint, the newest by default; LoRA adapters are merged or, without
    ``merge``, left where the engine has them. Raises UserError when ``run`` is no run folder, CheckpointError
    when the step does not exist or its files have changed."""
    if not RunPaths(run).config.is_file():
        raise UserError(f"{run}: not a run folder (no config.yaml)")
    steps = committed_steps(run)
    if not steps:
        raise CheckpointError(f"{run}: has no checkpoint yet")
    chosen = steps[0] if step is None else step
    if chosen not in steps:
        raise CheckpointError(
            f"{run}: no checkpoint of step {chosen}; there are {', '.join(map(str, sorted(steps)))}"
        )
    config = load_run_config(RunPaths(run).config)
    dtype = DTYPES[config.training.precision]
    manifest, module = _verified_module(run, chosen)
    tensors, adapters = (
        {name.removeprefix(prefix): value.to(dtype) for name, value in module if name.startswith(prefix)}
        for prefix in (STUDENT_PREFIX, ADAPTERS_PREFIX)
    )
    lora = config.student.lora
    if lora is not None and merge:
        tensors = merged(tensors, lora)
    return SavedStudent(chosen, manifest, config.model, tensors, adapters, lora)


def _verified_module(run: Path, step: int) -> tuple[dict[str, Any], list[tuple[str, torch.Tensor]]]:
    """A checkpoint's manifest, and its module's weights. Only files that fit the manifest are unpickled."""
    folder = step_folder(run, step)
    problems = problems_of(folder, needed=("config", "data", "teacher", "versions"))
    if problems:
        raise CheckpointError(f"{folder}: {'; '.join(problems[:3])}")
    manifest = read_manifest(folder)
    if saved_stage(manifest) == 3:  # the run itself may have been resumed at another stage
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        # The tag goes to the low-level reader: loading through an engine would take what `latest` names.
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    else:
        file = folder / "mp_rank_00_model_states.pt"
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["module"]
    return manifest, list(state.items())
