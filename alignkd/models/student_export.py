"""Write a trained student as a model folder of its family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from alignkd.config.schema import LoraSection, ModelSection
from alignkd.errors import UserError
from alignkd.models.agreement import student_folder, student_model_config
from alignkd.models.families import mobilevlm, transformers, transformers_loading
from alignkd.models.families.table import family_of
from alignkd.models.lora import write_adapters
from alignkd.models.saving import FileFormat, save_model_folder, write_folder


def save_student(
    out: Path,
    section: ModelSection,
    tensors: Mapping[str, torch.Tensor],
    file_format: FileFormat = "safetensors",
    *,
    replace: bool = False,
    card: str | None = None,
) -> None:
    """``tensors`` have our names and the dtype to save in. Raises what ``saving.write_folder`` raises, and
    UserError for a file format that the family does not have."""
    source = student_folder(section)
    if family_of(source) is None:
        published = {mobilevlm.public_name(name): value for name, value in tensors.items()}
        config = student_model_config(section)
        save_model_folder(out, config, published, source, file_format, replace=replace, card=card)
        return
    if file_format != "safetensors":
        raise UserError(f"--format {file_format}: only MobileVLM is also written so; valid here: safetensors")
    named = {name.removeprefix(transformers.PREFIX): value for name, value in tensors.items()}
    write_folder(
        out,
        lambda partial: transformers_loading.write_model(partial, source, named),
        replace=replace,
        card=card,
    )


def save_lora(
    out: Path, section: ModelSection, lora: LoraSection, tensors: Mapping[str, torch.Tensor]
) -> None:
    """LoRA adapters alone. ``tensors`` of the whole model have our names. Raises what ``saving.write_folder``
    raises."""
    source = student_folder(section)

    def public_name(name: str) -> str:
        if family_of(source) is None:
            return mobilevlm.public_name(name)
        return name.removeprefix(transformers.PREFIX)

    write_folder(out, lambda partial: write_adapters(partial, str(source), lora, tensors, public_name))
