"""What `alignkd eval`, `alignkd chat` and ``alignkd.load`` know of a model that answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image

from alignkd.config.schema import DEFAULT_MAX_IMAGE_PIXELS
from alignkd.data.records import IMAGE_MARKER, Turn
from alignkd.evaluate.generation import Decoding
from alignkd.evaluate.tasks.pictures import Picture, PictureFile, open_picture

# How an image becomes a square: padded, or its centre cut out. Families other than MobileVLM leave it to
# their processor.
Padding = Literal["pad", "crop", "processor"]


@dataclass(frozen=True)
class Request:
    """A conversation that ends with a question; its turns hold one marker `<image>` per image."""

    turns: tuple[Turn, ...]
    images: tuple[Any, ...] = ()  # as ``prepare`` returns them; one that occurs twice may be encoded once
    seed: int = 0  # of sampling


class AnsweringModel(ABC):
    """Made by ``evaluate.model.load``."""

    precision: str
    in_batches: ClassVar[bool] = True  # are requests answered together, or one at a time?

    def answer(
        self,
        image: str | Path | Image.Image | None,
        text: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> str:
        """The answer to one question, about an image or none. Temperature 0 is greedy decoding."""
        decoding = Decoding(
            max_new_tokens, temperature, top_p, (stop,) if isinstance(stop, str) else tuple(stop)
        )
        return self.answers([self.request(image, text, seed)], decoding)[0]

    @abstractmethod
    def answers(self, requests: Sequence[Request], decoding: Decoding = Decoding()) -> list[str]:  # noqa: B008
        """The answers to requests of any lengths. Raises UserError for a text that cannot be asked."""

    def request(self, image: str | Path | Image.Image | None, text: str, seed: int = 0) -> Request:
        """One question about an image or none. Raises UserError for an unusable image."""
        if image is None:
            return Request((Turn("human", text.replace(IMAGE_MARKER, "")),), (), seed)
        if isinstance(image, Image.Image):
            prepared = self._prepared(image, "the image", None)
        else:
            prepared = self.prepare(PictureFile(Path(image).parent, Path(image).name))
        turn = Turn("human", f"{IMAGE_MARKER}\n{text.replace(IMAGE_MARKER, '')}")
        return Request((turn,), (prepared,), seed)

    def prepare(self, picture: Picture, padding: Padding | None = None) -> Any:
        """What a request holds of a picture; ``padding`` None: as the model was trained. Raises UserError for
        an unusable picture."""
        return self._prepared(open_picture(picture, DEFAULT_MAX_IMAGE_PIXELS), str(picture), padding)

    @abstractmethod
    def _prepared(self, image: Image.Image, name: str, padding: Padding | None) -> Any: ...

    @abstractmethod
    def padding_for(self, wanted: Literal["pad", "crop"] | None, pads: bool) -> Padding:
        """How the images of a task are treated. ``wanted``: by the user; ``pads``: does the task pad them?
        Raises UserError where a family leaves no choice."""

    def answer_settings(self) -> dict[str, str]:
        """What its answers depend on beside weights, precision, batch size and padding."""
        return {}

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 of the weights, in the precision that answers."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...
