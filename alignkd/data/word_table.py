"""A hash table from words to numbers, made of arrays, which looks up a hundred thousand words at a time.

A dict would need a string object per word, and about three cache misses per look-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

IntArray = np.ndarray[Any, np.dtype[np.int64]]
BoolArray = np.ndarray[Any, np.dtype[np.bool_]]
KeyArray = np.ndarray[Any, np.dtype[np.uint64]]

SLOT_BITS = 19  # 10 MB
KEY_BYTES = 16
LONGEST = KEY_BYTES - 1  # bytes of a word; the last byte of its key is its length
_KEY = f"V{KEY_BYTES}"  # raw bytes: they may start anywhere, and numpy copies them as one item
_MASKS = np.array([b"\xff" * length for length in range(KEY_BYTES)], dtype=f"S{KEY_BYTES}").view(_KEY)
_FACTORS = tuple(np.uint64(odd) for odd in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F))


@dataclass(frozen=True)
class Words:
    """Texts split at every space into W words; between consecutive spaces there is an empty word."""

    raw: bytes  # the texts, each followed by a space, and padding
    start_W: IntArray
    length_W: IntArray  # bytes
    first_T: IntArray  # first word of each text

    def __getitem__(self, word: int) -> str:
        start = int(self.start_W[word])
        return self.raw[start : start + int(self.length_W[word])].decode()


def words_of(texts: Sequence[str]) -> Words:
    raw = " ".join([*texts, " " * KEY_BYTES]).encode()
    bytes_ = np.frombuffer(raw, dtype=np.uint8, count=len(raw) - KEY_BYTES)
    stop_W = np.flatnonzero(bytes_ == ord(" "))
    start_W = np.append(0, stop_W + 1)[:-1]
    of_text = np.array([text.count(" ") + 1 for text in texts], dtype=np.int64)
    return Words(raw, start_W, stop_W - start_W, np.cumsum(of_text) - of_text)


class WordTable:
    """Maps words to numbers other than 0. A word that is too long, or whose slot is taken, is not stored."""

    def __init__(self) -> None:
        self._keys = np.zeros(1 << SLOT_BITS, dtype=_KEY)
        self._numbers = np.zeros(1 << SLOT_BITS, dtype=np.int64)

    def find(self, words: Words) -> IntArray:
        """The numbers [W] of the words, 0 for those that are not stored."""
        keys_W2, slots_W = _keys_and_slots(words)
        differs_W2 = self._keys[slots_W].view("<u8").reshape(-1, 2) ^ keys_W2
        is_there_W = (differs_W2[:, 0] | differs_W2[:, 1]) == 0
        found: IntArray = self._numbers[slots_W] * (is_there_W & (words.length_W <= LONGEST))
        return found

    def add(self, words: Words, numbers_W: IntArray) -> None:
        keys_W2, slots_W = _keys_and_slots(words)
        usable = np.flatnonzero((words.length_W <= LONGEST) & (self._numbers[slots_W] == 0))
        slots, chosen = np.unique(slots_W[usable], return_index=True)
        self._keys[slots] = keys_W2[usable[chosen]].view(_KEY).reshape(-1)
        self._numbers[slots] = numbers_W[usable[chosen]]


def _keys_and_slots(words: Words) -> tuple[KeyArray, IntArray]:
    """The keys [W, 2] (arbitrary for words that are too long) and slots [W] of the words."""
    at_every_byte = np.ndarray((len(words.raw) - LONGEST,), _KEY, words.raw, strides=(1,))
    length_W = np.minimum(words.length_W, LONGEST)
    masks_W2 = _MASKS[length_W].view("<u8").reshape(-1, 2)
    keys_W2 = at_every_byte[words.start_W].view("<u8").reshape(-1, 2) & masks_W2
    keys_W2[:, 1] |= length_W.astype(np.uint64) << np.uint64(56)
    mixed = keys_W2[:, 0] * _FACTORS[0] ^ keys_W2[:, 1] * _FACTORS[1]
    mixed = (mixed ^ mixed >> np.uint64(32)) * _FACTORS[0]
    return keys_W2, (mixed >> np.uint64(64 - SLOT_BITS)).astype(np.int64)
