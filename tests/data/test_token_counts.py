"""Counting tokens by words is counting ids."""

from __future__ import annotations

import io
import random

import pytest
import sentencepiece

from alignkd.data import token_counts, word_table
from alignkd.data.token_counts import SPACE, TokenCounter, words_are_independent
from alignkd.data.tokenizer import SentencePieceTokenizer

PIECES = ["a", "red", "circle", "Größe", "大", "\n", "\t", " ", "  ", "</s>", "<0x0A>", ".", "?\n", "\u00a0"]


def texts(seed: int) -> list[str]:
    pick = random.Random(seed)
    pieces = [*PIECES, SPACE, "\0", "x" * 30]
    made = [pick.choice(["", " "]).join(pick.choices(pieces, k=pick.randrange(12))) for _ in range(400)]
    return ["", " ", "  ", "a ", " a", "a  b", f"a{SPACE} b", *made]


@pytest.fixture
def trained(request: pytest.FixtureRequest) -> SentencePieceTokenizer:
    out = io.BytesIO()
    corpus = [" ".join(random.Random(n).choices(PIECES[:5], k=9)) for n in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=out,
        minloglevel=2,
        hard_vocab_limit=False,
        num_threads=1,
        **request.param,
    )
    return SentencePieceTokenizer(out.getvalue(), "trained")


LLAMA = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "vocab_size": 300,
}


def test_the_fixtures_tokenizer_counts_by_words(tokenizer: SentencePieceTokenizer) -> None:
    assert words_are_independent(tokenizer.model)
    counter = TokenCounter(tokenizer)
    for seed in range(3):
        assert counter.counts(texts(seed)).tolist() == [len(tokenizer.encode(text)) for text in texts(seed)]


def random_texts(seed: int) -> list[str]:
    """Words of any length, of any characters that a file may hold, mostly behind one space each."""
    pick = random.Random(seed)
    ranges = [(0, 0x7F), (0x61, 0x7A), (0x61, 0x7A), (0x80, 0x24F), (0x2000, 0x30FF), (0x1F300, 0x1F6FF)]
    special = ["</s>", "<s>", "<unk>", "<image>", "<0x41>", SPACE, " ", "USER:", "x" * 15, "x" * 16]

    def word() -> str:
        low, high = pick.choice(ranges)
        letters = "".join(chr(pick.randint(low, high)) for _ in range(pick.randrange(1, 25)))
        return pick.choice([letters, letters, letters[:3], pick.choice(special)])

    made = [" ".join(word() for _ in range(pick.randrange(1, 12))) for _ in range(150)]
    return [*made, *(pick.choice([" ", "\n"]).join(pick.choices(made, k=2)) for _ in range(50))]


@pytest.mark.parametrize("slot_bits", [3, 19])
def test_random_texts_are_counted_exactly_over_several_calls(
    tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch, slot_bits: int
) -> None:
    monkeypatch.setattr(word_table, "SLOT_BITS", slot_bits)
    counter = TokenCounter(tokenizer)
    assert counter.counts([]).tolist() == []
    for seed in (0, 1, 0, 2, 1):  # what was asked before is found in the table, or beside it
        asked = random_texts(seed)
        assert counter.counts(asked).tolist() == [len(tokenizer.encode(text)) for text in asked]


def test_forgetting_words_changes_nothing(
    tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_counts, "MOST_KEPT", 3)
    counter = TokenCounter(tokenizer)
    for _ in range(2):
        assert counter.counts(texts(9)).tolist() == [len(tokenizer.encode(text)) for text in texts(9)]


@pytest.mark.parametrize(
    ("trained", "independent"),
    [
        (LLAMA, True),
        (LLAMA | {"split_by_whitespace": False}, False),
        (LLAMA | {"remove_extra_whitespaces": True}, False),
        (LLAMA | {"normalization_rule_name": "nmt_nfkc"}, False),
        (LLAMA | {"byte_fallback": False, "vocab_size": 60}, False),
        (LLAMA | {"add_dummy_prefix": False}, False),
        (LLAMA | {"treat_whitespace_as_suffix": True}, False),
        (LLAMA | {"user_defined_symbols": ["red circle"]}, False),
        (LLAMA | {"model_type": "unigram"}, False),
    ],
    indirect=["trained"],
)
def test_other_models_are_recognised_and_counted_whole(
    trained: SentencePieceTokenizer, independent: bool
) -> None:
    assert words_are_independent(trained.model) == independent
    assert TokenCounter(trained).counts(texts(4)).tolist() == [len(trained.encode(text)) for text in texts(4)]
