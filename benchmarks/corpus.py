"""A data file as big as the real ones, and a tokenizer with as many pieces, both made up from a seed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import sentencepiece

from alignkd.data.tokenizer import SentencePieceTokenizer

WORDS = 120_000  # different words; how often they come falls with their rank, as in real text
VOCABULARY = 32_000
_SYLLABLES = [c + v + e for c in "bcdfghklmnprstvwz" for v in "aeiou" for e in ("", "n", "r", "s", "t", "l")]


def made_up_words(seed: int = 0) -> np.ndarray:
    """[WORDS] strings of one to five syllables, frequent ones shorter."""
    rng = np.random.default_rng(seed)
    words: dict[str, None] = {}
    while len(words) < WORDS:
        syllables = min(1 + len(words) // 1000, 4) + int(rng.integers(0, 2))
        words["".join(rng.choice(_SYLLABLES, size=syllables))] = None
    return np.array(list(words))


def train_tokenizer(words: np.ndarray) -> SentencePieceTokenizer:
    """Byte-pair encoding with LLaMA's settings, of the words in their frequencies."""
    frequencies = (1_000_000 * np.arange(5, len(words) + 5) ** -1.2).astype(int) + 1
    table = "".join(f"{word}\t{count}\n" for word, count in zip(words, frequencies, strict=True))
    source, out = Path("words.tsv"), io.BytesIO()
    source.write_text(table)
    try:
        sentencepiece.SentencePieceTrainer.train(
            input=str(source),
            input_format="tsv",
            model_writer=out,
            model_type="bpe",
            vocab_size=VOCABULARY,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            minloglevel=2,
        )
    finally:
        source.unlink()
    return SentencePieceTokenizer(out.getvalue(), "made up")


def write_corpus(path: Path, entries: int, words: np.ndarray, seed: int = 0) -> None:
    """A LLaVA-style list: one to four rounds, nine of ten entries with an image, about 600 bytes each."""
    rng = np.random.default_rng(seed)
    weights = np.cumsum(np.arange(5, len(words) + 5) ** -1.2)
    marks = np.array([""] * 16 + [",", ",", ".", ".\n"])
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        for block in range(0, entries, 1000):
            drawn = np.searchsorted(weights, rng.random(100_000) * weights[-1])
            text = np.char.add(words[drawn], marks[rng.integers(0, len(marks), size=len(drawn))])
            at, values = 0, []
            for number in range(block, min(block + 1000, entries)):
                turns = []
                has_image = rng.random() < 0.9
                for turn in range(int(rng.choice([1, 1, 1, 2, 4]))):
                    asked, answered = int(rng.integers(6, 16)), int(rng.integers(8, 48 if turn == 0 else 22))
                    question = " ".join(text[at : at + asked].tolist()) + "?"
                    answer = " ".join(text[at + asked : at + asked + answered].tolist()) + "."
                    at = (at + asked + answered) % (len(drawn) - 200)
                    if has_image and turn == 0:
                        question = f"<image>\n{question}"
                    turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
                entry: dict[str, object] = {"id": f"{number:09}", "conversations": turns}
                if has_image:
                    entry["image"] = f"coco/train2017/{number:012}.jpg"
                values.append(json.dumps(entry))
            file.write((",\n" if block else "") + ",\n".join(values))
        file.write("]\n")
