"""Whether the weights in a folder match its ``config.json``, from the headers of safetensors files."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from alignkd.config import Config
from launcher.plan.sizes import RunSizes
from launcher.plan.tensors import ModelSizes

MAX_HEADER_BYTES = 100_000_000  # what safetensors itself allows
OLD_BUFFERS = ("rotary_emb.inv_freq", "position_ids")  # saved by old releases, never loaded


def weight_notes(config: Config, sizes: RunSizes) -> list[str]:
    """Model folders whose safetensors files hold a different number of parameters than the plan assumes.
    Pickled weights are ignored."""
    models: list[tuple[str | None, ModelSizes | None]] = [(config.model.teacher, sizes.teacher)]
    if config.model.vision_tower is None:  # else the folder holds a language model without a tower
        models.append((config.model.student, sizes.student))
    notes = []
    for folder, model in models:
        found = None if folder is None or model is None else parameters_on_disk(Path(folder))
        if found is not None and model is not None and found != model.in_files:
            notes.append(
                f"{folder}: its files hold {found:,} parameters, its config.json describes {model.in_files:,}"
            )
    return notes


def parameters_on_disk(folder: Path) -> int | None:
    """Elements in a folder's safetensors files; None when there are no files, or one is not readable."""
    files = sorted(folder.glob("*.safetensors"))
    total = 0
    for path in files:
        shapes = _shapes(path)
        if shapes is None:
            return None
        total += sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(OLD_BUFFERS))
    return total if files else None


def _shapes(path: Path) -> dict[str, list[int]] | None:
    """The header: eight bytes of length, then JSON. None for an invalid file, which loading will report."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER_BYTES:
                return None
            header: dict[str, Any] = json.loads(file.read(length))
        return {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
    except (OSError, ValueError, struct.error, AttributeError, KeyError, TypeError):
        return None
