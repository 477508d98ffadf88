"""Counts the tokens of texts without encoding them: words recur, so their counts are remembered.

Counts are exact. This works if no piece of the vocabulary spans a space, as in LLaMA's, so that words are
encoded independently of each other. For any other model every text is encoded as a whole.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import sentencepiece

from alignkd.data.tokenizer import SentencePieceTokenizer
from alignkd.data.word_table import BoolArray, IntArray, Words, WordTable, words_of

SPACE = "\u2581"  # how sentencepiece writes a space
MOST_KEPT = 1_000_000  # remembered units; about 100 MB
LONGEST_KEPT = 200  # characters; longer units rarely recur


class TokenCounter:
    """Computes ``len(tokenizer.encode(text))``, most efficiently for many texts at a time."""

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        self._tokenizer = tokenizer
        self._independent = words_are_independent(tokenizer.model)
        self._table = WordTable()
        self._known: dict[str, int] = {}  # a superset of the table

    def counts(self, texts: Sequence[str]) -> IntArray:
        if not self._independent or not texts:
            return self._encoded(texts)
        # A text has as many tokens as its words, each preceded by one space (which the tokenizer adds to the
        # first). But several spaces may form one piece: such a text is counted as a whole.
        words = words_of(texts)
        counts_W = self._table.find(words)
        whole_T = _have_unusual_spaces(texts, words)
        words_T = np.diff(words.first_T, append=len(counts_W))
        unknown = np.flatnonzero((counts_W == 0) & ~np.repeat(whole_T, words_T))
        counts_W[unknown] = self._counts_of_units([words[word] for word in unknown.tolist()])
        counts_T = np.add.reduceat(counts_W, words.first_T)
        counts_T[whole_T] = self._counts_of_units([texts[text] for text in np.flatnonzero(whole_T).tolist()])
        return counts_T

    def _encoded(self, texts: Sequence[str]) -> IntArray:
        return np.array([len(ids) for ids in self._tokenizer.encode_many(texts)], dtype=np.int64)

    def _counts_of_units(self, units: list[str]) -> list[int]:
        known = self._known
        if new := list({unit for unit in units if unit not in known}):
            counts = self._encoded(new)
            known.update(zip(new, counts.tolist(), strict=True))
            is_word = np.array([" " not in unit for unit in new])
            words = words_of([unit for unit in new if " " not in unit])
            self._table.add(words, counts[is_word])
        found = [known[unit] for unit in units]
        for unit in new:
            if len(unit) > LONGEST_KEPT:
                del known[unit]
        if len(known) > MOST_KEPT:
            known.clear()
        return found


def _have_unusual_spaces(texts: Sequence[str], words: Words) -> BoolArray:
    """[T] whether a text starts or ends with a space, has consecutive ones, or sentencepiece's own symbol."""
    have_T = np.add.reduceat(words.length_W == 0, words.first_T).astype(np.bool_)
    if SPACE.encode() in words.raw:
        have_T |= [SPACE in text for text in texts]
    return have_T


@functools.cache
def words_are_independent(model: bytes) -> bool:
    """Whether a sentencepiece model encodes a text as the sequence of its words, each preceded by a space.

    True for byte-pair encoding that does not change characters, marks every space, and has no piece with a
    space after another character. Unknown characters must fall back to bytes, because consecutive unknown
    characters would become one token, even across words.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.piece_size())
    # Spaces in every position, and every character: a normalizer changes at least one of them.
    probe = " a  b " + "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000) + " "
    return (
        any(processor.is_byte(piece) for piece in ids)
        # In byte-pair encoding scores are ranks of merges, in other models logarithms of frequencies.
        and all(processor.get_score(piece).is_integer() for piece in ids)
        and not any(_has_inner_space(processor.id_to_piece(piece)) for piece in ids)
        and processor.normalize(probe) == SPACE + probe.replace(" ", SPACE)
    )


def _has_inner_space(piece: str) -> bool:
    return " " in piece or any(b == SPACE and a != SPACE for a, b in pairwise(piece))
