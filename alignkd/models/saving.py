"""Write a model folder in the published MobileVLM V2 format: configuration, weights, tokenizer, tower."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from alignkd.errors import CheckpointError
from alignkd.models.configuration import MobileVLMConfig
from alignkd.models.tower import portable_tower_name
from alignkd.run_folder.atomic_files import flush_to_disk, flush_tree

FileFormat = Literal["safetensors", "bin"]


def save_model_folder(
    out: Path,
    config: MobileVLMConfig,
    tensors: Mapping[str, torch.Tensor],
    tokenizer_folder: Path,
    file_format: FileFormat = "safetensors",
    *,
    replace: bool = False,
    card: str | None = None,
) -> None:
    """``tensors`` have published names and the dtype to save in; ``card`` is the text of README.md.

    The tower's configuration and preprocessing go into a folder inside ``out``, so that it can be moved.
    Errors as in :func:`write_folder`.
    """
    write_folder(
        out,
        lambda partial: _write(partial, config, tensors, tokenizer_folder, file_format),
        replace=replace,
        card=card,
    )


def write_folder(
    out: Path, write: Callable[[Path], None], *, replace: bool = False, card: str | None = None
) -> None:
    """Atomic: ``out`` appears complete or not at all. ``write`` gets an empty folder to fill.

    Raises CheckpointError when ``out`` exists, unless ``replace`` is set: then the old folder stays until the
    new one is complete. Raises OSError when writing fails.
    """
    partial, old = out.with_name(out.name + ".tmp"), out.with_name(out.name + ".old")
    if out.exists() and not replace:
        raise CheckpointError(f"{out} exists; name a folder that does not")
    for left_over in (partial, old) if out.exists() else (partial,):
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(partial)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
        flush_tree(partial)
        if out.exists():
            out.rename(old)  # a folder that is not empty cannot be replaced in one step
        partial.rename(out)
        flush_to_disk(out.parent)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # an incomplete model is of no use
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file, or a pickle if the name ends in ``.bin``. Raises OSError, also for the errors
    of their own that both writers raise on a full disk."""
    try:
        if path.suffix == ".bin":
            torch.save(dict(tensors), path)
        else:
            contiguous = {name: value.contiguous() for name, value in tensors.items()}
            save_file(contiguous, path, {"format": "pt"})
    except (SafetensorError, RuntimeError) as error:
        raise OSError(errno.EIO, str(error).splitlines()[0], str(path)) from error


def _write(
    partial: Path,
    config: MobileVLMConfig,
    tensors: Mapping[str, torch.Tensor],
    tokenizer_folder: Path,
    file_format: FileFormat,
) -> None:
    """Write all files of the folder but README.md."""
    names = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}
    write_tensors(tensors, partial / names[file_format])
    tower = portable_tower_name(config.mm_vision_tower)
    facts = {key: value for key, value in config.raw.items() if key != "dtype"}  # newer name of the next key
    facts["torch_dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    _write_json(partial / "config.json", {**facts, "mm_vision_tower": tower})
    for path in sorted(tokenizer_folder.glob("*token*")):
        if path.is_file():
            shutil.copyfile(path, partial / path.name)
    (partial / tower).mkdir(parents=True, exist_ok=True)
    _write_json(partial / tower / "config.json", {"model_type": "clip_vision_model", **config.tower_config})
    _write_json(partial / tower / "preprocessor_config.json", config.preprocessor_config)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
