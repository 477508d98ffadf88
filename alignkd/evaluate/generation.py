"""Greedy and sampled decoding with a KV cache, for prompts of any lengths together.

Prompts are padded on the left, so that all answers grow in the same column. Each row draws from its own seed:
its answer does not depend on the rows beside it, except by rounding. (transformers' ``generate`` draws all
rows from one generator.) Shapes: B rows, L columns, D width, I distinct images, V vision tokens of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from alignkd.data.batch import IMAGE_TOKEN_ID, PADDING_ID
from alignkd.data.tokenizer import SentencePieceTokenizer
from alignkd.errors import UserError
from alignkd.models.families.mobilevlm import MobileVLM


@dataclass(frozen=True)
class Decoding:
    """How answers are made. An answer ends at ``</s>``, before a stop string, or at its longest."""

    max_new_tokens: int = 128
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # sample from the most likely tokens that hold this share
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises UserError for a value that means nothing."""
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens}: valid: at least 1")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError(f"temperature {self.temperature}: valid: 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: valid: more than 0, at most 1")
        if "" in self.stop:
            raise UserError("stop: an empty text would end every answer at once")


@dataclass(frozen=True)
class Prompt:
    """``ids`` with one IMAGE_TOKEN_ID for each of ``images``, which are numbers of the call's images."""

    ids: list[int]
    images: tuple[int, ...] = ()
    seed: int = 0  # of sampling


@torch.inference_mode()
def generate(
    model: MobileVLM,
    tokenizer: SentencePieceTokenizer,
    prompts: Sequence[Prompt],
    pixel_values: torch.Tensor | None,
    decoding: Decoding,
) -> list[str]:
    """The answer to each prompt. ``pixel_values``: float32 [I, 3, H, W] of the distinct images, which are
    encoded once each; None without images. The model must use plain attention."""
    device = model.head.weight.device
    ids_BL, mask_BL = _left_padded(prompts, model.config.vision_tokens)
    ids_BL, mask_BL = ids_BL.to(device), mask_BL.to(device)
    embeddings = model.language_model.embed_tokens(ids_BL.clamp(min=0))
    if pixel_values is not None:
        tokens_IVD = model.vision_tokens(pixel_values.to(device))
        order = torch.tensor([image for prompt in prompts for image in prompt.images], device=device)
        embeddings[ids_BL == IMAGE_TOKEN_ID] = tokens_IVD[order].flatten(0, 1).to(embeddings.dtype)
    positions = (mask_BL.cumsum(dim=1) - 1).clamp(min=0)
    uniform_BT = _uniform(prompts, decoding).to(device)
    cache, answers = DynamicCache(), [_Answer(tokenizer, decoding.stop) for _ in prompts]
    for step in range(decoding.max_new_tokens):
        hidden = model.decode(embeddings, cache, mask_BL, positions)
        next_ids_B = _choose(model.logits(hidden[:, -1]), decoding, uniform_BT[:, step])
        for answer, token in zip(answers, next_ids_B.tolist(), strict=True):
            answer.append(token)
        if all(answer.is_done for answer in answers):
            break
        embeddings = model.language_model.embed_tokens(next_ids_B[:, None])
        mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(prompts), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return [answer.text() for answer in answers]


class _Answer:
    """One answer as it grows; what comes after its end is not part of it."""

    def __init__(self, tokenizer: SentencePieceTokenizer, stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self.is_done = False

    def append(self, token: int) -> None:
        if self.is_done:
            return
        if token == self._tokenizer.eos_id:
            self.is_done = True
            return
        self._ids.append(token)
        if self._stop:
            text = self._tokenizer.decode(self._ids)
            self.is_done = any(stop in text for stop in self._stop)

    def text(self) -> str:
        text = self._tokenizer.decode(self._ids)
        ends = [text.index(stop) for stop in self._stop if stop in text]
        return text[: min(ends, default=len(text))].strip()


def _left_padded(prompts: Sequence[Prompt], vision_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, with each image's marker repeated ``vision_tokens`` times, and a mask, int64 [B, L] both."""
    rows = [
        [
            token
            for token_id in prompt.ids
            for token in [token_id] * (vision_tokens if token_id == IMAGE_TOKEN_ID else 1)
        ]
        for prompt in prompts
    ]
    longest = max(map(len, rows))
    ids = [[PADDING_ID] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def _uniform(prompts: Sequence[Prompt], decoding: Decoding) -> torch.Tensor:
    """One draw from [0, 1) for each token, float64 [B, longest answer]; drawn on the CPU, so that a seed
    means the same everywhere."""
    shape = (decoding.max_new_tokens,)
    if decoding.temperature == 0:
        return torch.zeros(len(prompts), *shape)
    draws = [
        torch.rand(shape, generator=torch.Generator().manual_seed(prompt.seed), dtype=torch.float64)
        for prompt in prompts
    ]
    return torch.stack(draws)


def _choose(logits_BN: torch.Tensor, decoding: Decoding, uniform_B: torch.Tensor) -> torch.Tensor:
    """The next token of each row, int64 [B]."""
    if decoding.temperature == 0:
        return logits_BN.argmax(dim=-1)
    # In float64: a cumulated sum over a vocabulary must not lose its small probabilities.
    share_BN, token_BN = (logits_BN.double() / decoding.temperature).softmax(-1).sort(-1, descending=True)
    before_BN = share_BN.cumsum(-1) - share_BN
    cut_BN = before_BN >= decoding.top_p
    cut_BN[:, 0] = False  # the most likely token always stays
    share_BN = share_BN.masked_fill(cut_BN, 0.0)
    reached_BN = share_BN.cumsum(-1)
    column_B1 = (reached_BN <= uniform_B[:, None] * reached_BN[:, -1:]).sum(-1, keepdim=True)
    return token_BN.gather(-1, column_B1.clamp(max=share_BN.shape[-1] - 1))[:, 0]
