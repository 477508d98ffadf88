"""A MobileVLM V2 that answers, with the `v1` template and our own decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from PIL import Image

from alignkd.config.schema import DEFAULT_MAX_IMAGE_PIXELS
from alignkd.data.image_paths import BadImage
from alignkd.data.images import AspectRatio, ImageProcessor
from alignkd.data.templates import encode_prompt
from alignkd.data.tokenizer import SentencePieceTokenizer
from alignkd.errors import UserError
from alignkd.evaluate.answering_model import AnsweringModel, Padding, Request
from alignkd.evaluate.generation import Decoding, Prompt, generate
from alignkd.models.attention import use_plain_attention
from alignkd.models.families.mobilevlm import MobileVLM
from alignkd.models.loading import fingerprint


@dataclass
class MobileVLMAnswers(AnsweringModel):
    """Requests are answered as one batch; their images are pixel values, float32 [3, H, W]."""

    model: MobileVLM
    tokenizer: SentencePieceTokenizer
    precision: str
    _processor: ImageProcessor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        use_plain_attention(self.model.eval().language_model)
        self._processor = ImageProcessor(self.model.config.preprocessor_config, DEFAULT_MAX_IMAGE_PIXELS)

    def answers(self, requests: Sequence[Request], decoding: Decoding = Decoding()) -> list[str]:  # noqa: B008
        if not requests:
            return []
        numbers: dict[int, int] = {}  # id of a tensor -> its number among the distinct ones
        distinct: list[torch.Tensor] = []
        for image in (image for request in requests for image in request.images):
            if id(image) not in numbers:
                numbers[id(image)] = len(distinct)
                distinct.append(image)
        prompts = [
            Prompt(
                encode_prompt(request.turns, "v1", self.tokenizer),
                tuple(numbers[id(image)] for image in request.images),
                request.seed,
            )
            for request in requests
        ]
        pixel_values = torch.stack(distinct) if distinct else None
        return generate(self.model, self.tokenizer, prompts, pixel_values, decoding)

    def _prepared(self, image: Image.Image, name: str, padding: Padding | None) -> torch.Tensor:
        aspect_ratio: AspectRatio = "square" if (padding or self.padding) == "crop" else "pad"
        try:
            return self._processor.pixels(image, name, aspect_ratio)
        except BadImage as error:
            raise UserError(str(error)) from None

    @property
    def padding(self) -> Padding:
        """How images became squares when the model was trained."""
        return "pad" if self.model.config.image_aspect_ratio == "pad" else "crop"

    def padding_for(self, wanted: Literal["pad", "crop"] | None, pads: bool) -> Padding:
        return wanted or (self.padding if pads else "crop")

    def fingerprint(self) -> str:
        return fingerprint(self.model)

    @property
    def device(self) -> torch.device:
        return self.model.head.weight.device
