"""Greedy decoding with a KV cache, for prompts of equal length, which need no padding mask."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from alignkd.data.batch import Batch
from alignkd.models.families.mobilevlm import MobileVLM


@torch.inference_mode()
def greedy_decode(model: MobileVLM, batch: Batch, eos_id: int, max_new_tokens: int) -> list[list[int]]:
    """Per sample the most likely tokens, up to ``eos_id`` (not included) or ``max_new_tokens``.

    All prompts must have the same length. Images are encoded once; each new token costs one position.
    """
    assert batch.counts.tokens == batch.input_ids_BL.numel(), "prompts of a batch have equal length"
    cache = DynamicCache()
    embeddings = model.embed(batch, model.vision_tokens(batch.pixel_values))
    answers: list[list[int]] = [[] for _ in range(batch.sample_count)]
    open_answers = set(range(len(answers)))
    for _ in range(max_new_tokens):
        next_ids_B = model.logits(model.decode(embeddings, cache)[:, -1]).argmax(dim=-1)
        for row, token in enumerate(next_ids_B.tolist()):
            if token == eos_id:
                open_answers.discard(row)
            elif row in open_answers:
                answers[row].append(token)
        if not open_answers:
            break
        embeddings = model.language_model.embed_tokens(next_ids_B[:, None])
    return answers
