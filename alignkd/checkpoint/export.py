"""The trained student as a model folder: from the live engine of a run, or from a checkpoint afterwards.

The adapters are training-only and stay behind.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from alignkd.checkpoint.layout import (
    checkpoints_folder,
    committed_steps,
    differences,
    read_manifest,
    step_name,
)
from alignkd.config import load_config
from alignkd.config.schema import Config
from alignkd.engine.ranks import Ranks
from alignkd.errors import CheckpointError, UserError
from alignkd.models.agreement import student_folder, student_model_config
from alignkd.models.loading import DTYPES, full_tensors, public_name
from alignkd.models.saving import FileFormat, save_model_folder

STUDENT_PREFIX = "student."


def export_engine(engine: Any, config: Config, out: Path, ranks: Ranks) -> None:
    """Write the engine's student weights in the training precision. Collective; rank 0 writes."""
    tensors = {}
    for name, value in full_tensors(engine.module.student):
        if ranks.is_first:
            tensors[public_name(name)] = value.detach().cpu().clone()
    if ranks.is_first:
        # A finished run that is started again exports again.
        facts, tokenizer = student_model_config(config.model), student_folder(config.model)
        save_model_folder(out, facts, tensors, tokenizer, replace=True)
    ranks.barrier()


def export_run(run: Path, out: Path, step: int | None, file_format: FileFormat) -> int:
    """Write the student of a checkpoint (the newest by default) to ``out``, in one process, without a GPU.

    Returns the step. Raises UserError when ``out`` exists, the step does not, or its files have changed.
    """
    if out.exists():
        raise UserError(f"{out} exists; name a folder that does not")
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: not a run folder (no config.yaml)")
    steps = committed_steps(run)
    if not steps:
        raise CheckpointError(f"{run}: has no checkpoint yet")
    chosen = steps[0] if step is None else step
    if chosen not in steps:
        raise CheckpointError(
            f"{run}: no checkpoint of step {chosen}; there are {', '.join(map(str, sorted(steps)))}"
        )
    config = load_config(run / "config.yaml")
    dtype = DTYPES[config.training.precision]
    tensors = {
        public_name(name.removeprefix(STUDENT_PREFIX)): value.to(dtype)
        for name, value in _module_tensors(run, chosen, config.student.zero_stage)
        if name.startswith(STUDENT_PREFIX)
    }
    save_model_folder(
        out, student_model_config(config.model), tensors, student_folder(config.model), file_format
    )
    return chosen


def _module_tensors(run: Path, step: int, zero_stage: int) -> Iterable[tuple[str, torch.Tensor]]:
    """The engine's module weights. Only files that fit the manifest are unpickled."""
    folder = checkpoints_folder(run) / step_name(step)
    try:
        files = read_manifest(folder)["files"]
        problems = differences(folder, files, sorted(files))
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems = [f"cannot be read ({error})"]
    if problems:
        raise CheckpointError(f"{folder}: {'; '.join(problems[:3])}")
    if zero_stage == 3:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        state = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    else:
        file = folder / "mp_rank_00_model_states.pt"
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["module"]
    return list(state.items())
