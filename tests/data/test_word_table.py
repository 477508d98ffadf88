"""A table of words gives back what it was given, or nothing."""

from __future__ import annotations

import random

import numpy as np
import pytest

from alignkd.data import word_table
from alignkd.data.word_table import LONGEST, WordTable, words_of

LETTERS = ["a", "b", "\0", "é", "大", "😀", "\n"]


def random_words(seed: int, count: int) -> list[str]:
    pick = random.Random(seed)
    return ["".join(pick.choices(LETTERS, k=pick.randrange(1, 18))) for _ in range(count)]


def test_texts_are_split_at_every_space() -> None:
    texts = ["one two", "", " 大  x ", "a\nb"]
    words = words_of(texts)
    cut = [word for text in texts for word in text.split(" ")]
    assert [words[number] for number in range(len(words.start_W))] == cut
    assert words.first_T.tolist() == [0, 2, 3, 8]
    assert words_of([]).start_W.tolist() == []


@pytest.mark.parametrize("slot_bits", [1, 6, 12])
def test_a_word_has_its_own_number_or_none(monkeypatch: pytest.MonkeyPatch, slot_bits: int) -> None:
    monkeypatch.setattr(word_table, "SLOT_BITS", slot_bits)
    table, numbers = WordTable(), {}
    for turn in range(4):
        new = sorted({*random_words(turn, 40), *(f"{'x' * n}{turn}" for n in range(20))} - set(numbers))
        numbers |= {word: len(numbers) + n for n, word in enumerate(new, 1)}
        table.add(words_of(new), np.array([numbers[word] for word in new]))
        # Beginnings of known words, and words with a NUL behind, are other words.
        asked = [*numbers, *random_words(turn + 100, 40), *(word + "\0" for word in numbers), "a", ""]
        found = table.find(words_of(asked)).tolist()
        assert all(number in (0, numbers.get(word)) for word, number in zip(asked, found, strict=True))
        short = [word for word in numbers if len(word.encode()) <= LONGEST]
        kept = sum(number > 0 for number in table.find(words_of(short)).tolist())
        assert kept > 0.9 * len(short) if slot_bits == 12 else 1 <= kept <= 1 << slot_bits


def test_a_stored_word_keeps_its_number() -> None:
    table = WordTable()
    for number in (3, 4):
        table.add(words_of(["word", "word"]), np.array([number, number]))
    assert table.find(words_of(["a word", "words"])).tolist() == [0, 3, 0]
