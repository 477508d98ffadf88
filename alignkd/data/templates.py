"""Conversation templates: encode turns as ids and labels, exactly as the authors' preprocessing does.

``plain`` (pretraining): ``<s>``, the image, the caption and a newline; everything after the image is
supervised. ``v1`` (finetuning): ``<s>``, the system sentence, then ``USER: `` question `` ASSISTANT: ``
answer ``</s>`` per round; answers and their ``</s>`` are supervised.

A template produces a list of parts: images, ends of answers (``</s>``), and the chunks of text between them.
Each chunk is encoded on its own (see ``tokenizer``). Only the marker ``<image>`` in a human turn becomes an
image; anything else in the data, including special tokens and an ``<image>`` in an answer, stays text.
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
    """Text that is encoded as one string: an unsupervised prompt and a supervised answer."""

    prompt: str
    answer: str = ""


Part = Mark | Chunk


@dataclass(frozen=True)
class Encoded:
    """``ids`` with one IMAGE_TOKEN_ID per image; ``labels`` of the same length, not shifted."""

    ids: list[int]
    labels: list[int]


def encode(turns: Sequence[Turn], template: TemplateName, tokenizer: SentencePieceTokenizer) -> Encoded:
    """The ids and labels of a conversation that ends with an answer."""
    return _encode_parts(conversation_parts(turns, template), tokenizer)


def encode_prompt(
    turns: Sequence[Turn], template: TemplateName, tokenizer: SentencePieceTokenizer
) -> list[int]:
    """The ids to generate from, for a conversation that ends with a question; v1 ends in `` ASSISTANT:``.

    The space after the colon belongs to the first piece of the answer, which the model generates.
    """
    if template == "plain":
        parts: list[Part] = [Mark.IMAGE] * turns[0].text.count(IMAGE_MARKER)
    else:
        parts = _v1_parts(turns)
    return _encode_parts(parts, tokenizer).ids


def conversation_parts(turns: Sequence[Turn], template: TemplateName) -> list[Part]:
    """The parts of a sample before encoding, without the initial ``<s>``."""
    return _TEMPLATES[template](turns)


def template_problem(turns: Sequence[Turn], template: TemplateName) -> str | None:
    """Why a sample does not fit a template, or None."""
    if template == "plain":
        if len(turns) != 2:
            return f"template plain takes one question and one answer, found {len(turns)} turns"
        if IMAGE_MARKER not in turns[0].text:
            return "template plain needs an image"
    return None


def _plain_parts(turns: Sequence[Turn]) -> list[Part]:
    # The question is dropped except for its images: the authors train captions on images only.
    question, caption = turns
    return [Mark.IMAGE] * question.text.count(IMAGE_MARKER) + [Chunk("", caption.text + "\n")]


def _v1_parts(turns: Sequence[Turn]) -> list[Part]:
    parts: list[Part] = []
    start = SYSTEM_SENTENCE + " "  # the next round follows </s> without a space
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
    """Move the marker to the front, followed by a newline, if there is only one; leave several in place."""
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
            # The answer starts with a space, which no piece spans: the prompt alone has the same ids.
            asked = len(tokenizer.encode(part.prompt)) if part.answer else len(chunk)
            ids += chunk
            labels += [IGNORE_INDEX] * asked + chunk[asked:]
    return Encoded(ids, labels)


def embedded_lengths(
    conversations: Sequence[Sequence[Part]], counter: TokenCounter, vision_tokens: int
) -> IntArray:
    """The length of each conversation in embedding tokens, ``vision_tokens`` per image; int64."""
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
