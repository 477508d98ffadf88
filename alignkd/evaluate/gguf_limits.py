"""What a GGUF export leaves no choice in, and the wheel that it needs. Without torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from alignkd.errors import UserError


def refuse_choices(
    folder: Path,
    *,
    precision: str | None = None,
    image_padding: str | None = None,
    device: str | None = None,
) -> None:
    """Raises UserError for what the file or llama.cpp settles."""
    if precision is not None:
        raise UserError(f"{folder}: precision {precision!r:.80}: a GGUF has the one it was exported with")
    if image_padding is not None:
        raise UserError(
            f"{folder}: --image-padding {image_padding}: llama.cpp decides by itself what a GGUF sees"
        )
    if device is not None and device.partition(":")[0] != "cpu":
        raise UserError(f"{folder}: device {device!r:.80}: a GGUF answers on the CPU")


def require_llama_cpp(folder: Path) -> None:
    """Raises UserError where this Python has no llama.cpp."""
    if find_spec("xllamacpp") is None:
        raise UserError(f"{folder}: a GGUF answers through llama.cpp: pip install 'alignkd[gguf]'")
