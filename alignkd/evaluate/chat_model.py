"""A model of transformers' families that answers: its own chat template, processor and ``generate``.

Requests are answered one at a time. Families differ in how a padded batch of several images is put together,
and an answer does not depend on what it is batched with this way.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from transformers import GenerationConfig

from alignkd.data.chat_encoder import ChatEncoder
from alignkd.errors import UserError
from alignkd.evaluate.answering_model import AnsweringModel, Padding, Request
from alignkd.evaluate.generation import Decoding
from alignkd.models.building import hash_tensors
from alignkd.models.families.table import Family


@dataclass
class ChatModel(AnsweringModel):
    """``whole`` is transformers' model. Images of a request are decoded pictures."""

    whole: Any
    family: Family
    encoder: ChatEncoder
    precision: str
    image_options: dict[str, Any] = field(default_factory=dict)  # of the processor
    in_batches: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.whole.eval()
        own = self.whole.generation_config.eos_token_id
        # Sampling and penalties that the folder asks for do not apply: `generate` would take from here
        # whatever the settings of a request leave open.
        self.whole.generation_config = GenerationConfig()
        self._ends = {self.encoder.end_token_id(), *([own] if isinstance(own, int) else own or [])}

    def answers(self, requests: Sequence[Request], decoding: Decoding = Decoding()) -> list[str]:  # noqa: B008
        return [self._answer(request, decoding) for request in requests]

    @torch.inference_mode()
    def _answer(self, request: Request, decoding: Decoding) -> str:
        inputs = {name: value.to(self.device) for name, value in self.inputs(request).items()}
        sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
        config = GenerationConfig(
            max_new_tokens=decoding.max_new_tokens,
            do_sample=decoding.temperature > 0,
            eos_token_id=sorted(self._ends),
            pad_token_id=0,
            **(sampling if decoding.temperature > 0 else {}),
        )
        stop = {"stop_strings": list(decoding.stop), "tokenizer": self.encoder.tokenizer}
        with torch.random.fork_rng(devices=[] if self.device.type == "cpu" else [self.device]):
            torch.manual_seed(request.seed)
            row = self.whole.generate(**inputs, generation_config=config, **(stop if decoding.stop else {}))[
                0
            ]
        ids = row[inputs["input_ids"].shape[1] :].tolist()
        end = next((number for number, token in enumerate(ids) if token in self._ends), len(ids))
        text: str = self.encoder.tokenizer.decode(ids[:end], skip_special_tokens=False)
        cuts = [text.index(one) for one in decoding.stop if one in text]
        return text[: min(cuts, default=len(text))].strip()

    def inputs(self, request: Request) -> dict[str, torch.Tensor]:
        """Of ``generate``: what the family's processor would return for this one text."""
        prompt = self.encoder.prompt(request.turns, request.images, self.image_options)
        ids_1L = torch.tensor([prompt.ids])
        inputs = {"input_ids": ids_1L, "attention_mask": torch.ones_like(ids_1L)}
        for name, value in prompt.inputs.items():
            value = value[None] if self.family.inputs_by_row else value
            inputs[name] = value.to(self.whole.dtype) if name == "pixel_values" else value
        if self.family.marks_images is not None:
            inputs[self.family.marks_images] = (ids_1L == self.whole.config.image_token_id).long()
        return inputs

    def _prepared(self, image: Image.Image, name: str, padding: Padding | None) -> Image.Image:
        return image.convert("RGB")

    def padding_for(self, wanted: Literal["pad", "crop"] | None, pads: bool) -> Padding:
        if wanted is not None:
            raise UserError(
                f"--image-padding {wanted}: only for MobileVLM; the processor of {self.family.model_type} "
                "decides by itself"
            )
        return "processor"

    def answer_settings(self) -> dict[str, str]:
        options = self.image_options
        return {"image_options": json.dumps(options, sort_keys=True)} if options else {}

    def fingerprint(self) -> str:
        return hash_tensors(self.whole.named_parameters(), hashing=True)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.whole.device
        return device
