"""A tiny sentencepiece tokenizer for the sample task, with LLaMA's settings and special ids."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import sentencepiece

from alignkd.data.sample_task.questions import POSITIONS, all_texts
from alignkd.data.templates import SYSTEM_SENTENCE

VOCABULARY = 640
ROLES = ("USER:", "ASSISTANT:")
_DELIMITER = "\t"
_SPACE = "\u2581"  # sentencepiece's symbol for a space


def train_tokenizer() -> bytes:
    """The bytes of ``tokenizer.model`` for the sample task."""
    # A position is one piece: a model learns within minutes to find a cell by one token, but often fails
    # to by two.
    return train_on_texts(list(all_texts()), POSITIONS)


def train_on_texts(texts: Sequence[str], phrases: Sequence[str]) -> bytes:
    """The bytes of ``tokenizer.model``: BPE with byte fallback, unk 0, bos 1, eos 2, no pad. Every word of
    ``texts`` and each of ``phrases`` becomes one piece, as far as the vocabulary has room.

    So does the system sentence of `v1`: it carries no information here, and takes up one position instead of
    two dozen.
    """
    lines = [SYSTEM_SENTENCE, *ROLES, *(_delimited(text, phrases) for text in texts)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # The trainer only merges pairs that occur more than once.
        sentence_iterator=iter(lines * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        # Pieces may contain several words, but only where the training text has no delimiter.
        split_by_whitespace=False,
        split_by_unicode_script=False,
        max_sentencepiece_length=200,
        pretokenization_delimiter=_DELIMITER,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _delimited(text: str, phrases: Sequence[str]) -> str:
    """With the delimiter between words and before punctuation."""
    for phrase in phrases:
        text = text.replace(phrase, phrase.replace(" ", _SPACE))
    words = re.findall(r"[^\s?]+|\?", text.replace(" ", f" {_SPACE}"))
    return _DELIMITER.join(words)
