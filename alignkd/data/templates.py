"""Conversation templates: turns -> ids and labels, as the authors' preprocessing makes them.

``plain`` (pretraining): ``<s>``, the image, the caption and a newline; all after the image is supervised.
``v1`` (finetuning): ``<s>``, the system sentence, then ``USER: `` question `` ASSISTANT: `` answer ``</s>``
per round; answers and their ``</s>`` are supervised.

A template makes a list of parts: images, ends of an answer (``</s>``), and chunks of text between them. Each
chunk is encoded on its own (see ``tokenizer``). Only the marker ``<image>`` in a human turn is an image;
everything else that a user wrote, special tokens and an ``<image>`` inside an answer included, stays text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, NamedTuple

import numpy as np

from alignkd.data.batch import IGNORE_INDEX, IMAGE_TOKEN_ID
from alignkd.data.records import IMAGE_MARKER, Turn
from alignkd.data.token_counts import TokenCounter
from alignkd.data.tokenizer import SentencePieceTokenizer

TemplateName = Literal["plain", "v1"]
IntArray = np.ndarray[Any, np.dtype[np.int64]]
SYSTEM_SENTENCE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class Mark(Enum):
    IMAGE = "image"
    END = "end of an answer"


class Chunk(NamedTuple):
    """Text that is encoded in one go: what was asked, and what is to be learnt."""

    prompt: str
    answer: str = ""


Part = Mark | Chunk


@dataclass(frozen=True)
class Encoded:
    """``ids`` with one IMAGE_TOKEN_ID per image; ``labels`` of the same length, not shifted."""

    ids: list[int]
    labels: list[int]


def encode(turns: Sequence[Turn], template: TemplateName, tokenizer: SentencePieceTokenizer) -> Encoded:
    """A conversation that ends with an answer -> ids and labels."""
    return _encode_parts(conversation_parts(turns, template), tokenizer)


def encode_prompt(
    turns: Sequence[Turn], template: TemplateName, tokenizer: SentencePieceTokenizer
) -> list[int]:
    """A conversation that ends with a question -> ids to generate from; v1 ends in `` ASSISTANT:``.

    The space after the colon belongs to the answer's first piece, which is the model's to write.
    """
    if template == "plain":
        parts: list[Part] = [Mark.IMAGE] * turns[0].text.count(IMAGE_MARKER)
    else:
        parts = _v1_parts(turns)
    return _encode_parts(parts, tokenizer).ids


def conversation_parts(turns: Sequence[Turn], template: TemplateName) -> list[Part]:
    """What a sample is made of, before any text is encoded (``<s>`` comes first and is not listed)."""
    return _TEMPLATES[template](turns)


def template_problem(turns: Sequence[Turn], template: TemplateName) -> str | None:
    """Why a checked sample does not fit a template, or None."""
    if template == "plain":
        if len(turns) != 2:
            return f"template plain takes one question and one answer, found {len(turns)} turns"
        if IMAGE_MARKER not in turns[0].text:
            return "template plain needs an image"
    return None


def _plain_parts(turns: Sequence[Turn]) -> list[Part]:
    # The question is dropped, its images stay: the authors train captions on the image alone.
    question, caption = turns
    return [Mark.IMAGE] * question.text.count(IMAGE_MARKER) + [Chunk("", caption.text + "\n")]


def _v1_parts(turns: Sequence[Turn]) -> list[Part]:
    parts: list[Part] = []
    start = SYSTEM_SENTENCE + " "  # after </s> the next round follows without a space
    for number in range(0, len(turns), 2):
        question = _front_marker(turns[number].text)
        *before, last = f"{start}USER: {question} ASSISTANT:".split(IMAGE_MARKER)
        for text in before:
            parts += [Chunk(text), Mark.IMAGE]
        if number + 1 < len(turns):
            parts += [Chunk(last, " " + turns[number + 1].text), Mark.END]
        else:
            parts.append(Chunk(last))
        start = ""
    return parts


def _front_marker(text: str) -> str:
    """The only marker of a turn moves to its front, followed by a newline; several stay where they are."""
    if text.count(IMAGE_MARKER) != 1:
        return text
    return f"{IMAGE_MARKER}\n{text.replace(IMAGE_MARKER, '').strip()}".strip()


_TEMPLATES: dict[str, Callable[[Sequence[Turn]], list[Part]]] = {"plain": _plain_parts, "v1": _v1_parts}


def _encode_parts(parts: Sequence[Part], tokenizer: SentencePieceTokenizer) -> Encoded:
    ids, labels = [tokenizer.bos_id], [IGNORE_INDEX]
    for part in parts:
        if part is Mark.IMAGE:
            ids.append(IMAGE_TOKEN_ID)
            labels.append(IGNORE_INDEX)
        elif part is Mark.END:
            ids.append(tokenizer.eos_id)
            labels.append(tokenizer.eos_id)
        else:
            assert isinstance(part, Chunk)
            chunk = tokenizer.encode(part.prompt + part.answer)
            # The answer starts at a space, and no piece spans one: so the prompt alone has the same ids.
            asked = len(tokenizer.encode(part.prompt)) if part.answer else len(chunk)
            ids += chunk
            labels += [IGNORE_INDEX] * asked + chunk[asked:]
    return Encoded(ids, labels)


def embedded_lengths(
    conversations: Sequence[Sequence[Part]], counter: TokenCounter, vision_tokens: int
) -> IntArray:
    """Length of each conversation in embedding tokens, an image being ``vision_tokens`` of them."""
    lengths: list[int] = []
    texts: list[str] = []
    of_conversation: list[int] = []
    for number, parts in enumerate(conversations):
        length = 1  # <s>
        for part in parts:
            if isinstance(part, Chunk):
                texts.append(part.prompt + part.answer)
                of_conversation.append(number)
            else:
                length += vision_tokens if part is Mark.IMAGE else 1
        lengths.append(length)
    embedded = np.array(lengths, dtype=np.int64)
    np.add.at(embedded, np.array(of_conversation, dtype=np.int64), counter.counts(texts))
    return embedded
