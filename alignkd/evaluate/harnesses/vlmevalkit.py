"""Models of alignkd in VLMEvalKit, which knows a model class once `vlmeval/vlm/__init__.py` imports it.

VLMEvalKit builds the prompts, writes the images to files and scores; this adapter only answers. Written for
VLMEvalKit at commit e8e78f0, whose interface is ``vlmeval.vlm.base.BaseModel``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmeval.vlm.base import BaseModel

import alignkd
from alignkd.data.records import IMAGE_MARKER, Speaker, Turn
from alignkd.evaluate.answering_model import Request
from alignkd.evaluate.generation import Decoding

_SPEAKERS: dict[str, Speaker] = {"user": "human", "assistant": "gpt"}


class AlignKD(BaseModel):  # type: ignore[misc]
    """An export, a run or a published folder; the first arguments are those of :func:`alignkd.load`, the
    others those of ``answer``."""

    INTERLEAVE = True
    allowed_types = ["text", "image"]  # the base class refuses videos by this

    def __init__(
        self,
        folder: str,
        step: int | None = None,
        device: str | None = None,
        precision: str | None = None,
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.model = alignkd.load(folder, step=step, device=device, precision=precision)
        self.decoding = Decoding(max_new_tokens, temperature, top_p, tuple(stop))

    def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer to one question: texts and paths of images, in order."""
        return self.chat_inner([{"role": "user", "content": message}], dataset)

    def chat_inner(self, messages: list[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer to the last of the messages, whose roles are `user` and `assistant` in turn."""
        turns, images = [], []
        for message in messages:
            text, found = self._parts(message["content"])
            turns.append(Turn(_SPEAKERS[message["role"]], text))
            images += found
        return self.model.answers([Request(tuple(turns), tuple(images))], self.decoding)[0]

    def _parts(self, content: list[dict[str, Any]]) -> tuple[str, list[Any]]:
        """Text with a marker per image, and the prepared images."""
        parts, images = [], []
        for item in content:
            if item["type"] == "image":
                parts.append(IMAGE_MARKER)
                images.append(self.model.request(Path(item["value"]), "").images[0])
            else:
                parts.append(item["value"].replace(IMAGE_MARKER, ""))
        return "\n".join(parts), images
