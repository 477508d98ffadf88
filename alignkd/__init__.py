"""alignkd: distil a large vision-language model into a small one (Align-KD, CVPR 2025)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alignkd.evaluate.answering_model import AnsweringModel

__version__ = "0.1.0"


def load(
    folder: str | Path, *, step: int | None = None, device: str | None = None, precision: str | None = None
) -> AnsweringModel:
    """A model that answers questions about images, from a model folder, a GGUF export or a run:
    ``alignkd.load("my-student").answer("photo.jpg", "What is this?")``. See
    :func:`alignkd.evaluate.model.load`."""
    from alignkd.evaluate.model import load as load_answering  # torch takes seconds to import

    return load_answering(folder, step=step, device=device, precision=precision)
