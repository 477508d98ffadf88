"""What a whole run needs on disk: two model folders with random weights, images, samples of exact length."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from sentencepiece import SentencePieceProcessor

from alignkd.data.sample_task.tokenizer import train_tokenizer
from alignkd.models.configuration import LLAMA_KEYS, MobileVLMConfig
from alignkd.models.families.mobilevlm import MobileVLM, public_name
from alignkd.models.saving import save_model_folder
from alignkd.models.tower import default_preprocessor
from benchmarks.batches import VISION_TOKENS
from benchmarks.data import write_images
from benchmarks.models import Pair, random_pair

IMAGES = 16
SAVES = 2  # of a run, the last one at its end
TOWER = "tower"


def write_models(folder: Path, pair: Pair) -> None:
    """``folder/teacher`` and ``folder/student``, in fp32, and images in ``folder/images``."""
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "tokenizer.model").write_bytes(train_tokenizer())
    models = random_pair(pair, torch.float32, torch.device("cpu"))
    for name, model in zip(("teacher", "student"), models, strict=True):
        tensors = {public_name(key): value for key, value in model.state_dict().items()}
        save_model_folder(folder / name, _complete(model), tensors, tokenizer)
    (folder / "images").mkdir()
    write_images(folder / "images", IMAGES)


def _complete(model: MobileVLM) -> MobileVLMConfig:
    """The configuration with a config.json, and with a tower that is found in the folder."""
    config = model.config
    keys = (*LLAMA_KEYS, "num_key_value_heads", "rope_theta", "mm_hidden_size")
    raw = {key: getattr(config, key) for key in keys} | {"mm_vision_tower": TOWER, "model_type": "mobilevlm"}
    preprocessor = default_preprocessor(config.tower_config["image_size"])
    return dataclasses.replace(config, mm_vision_tower=TOWER, raw=raw, preprocessor_config=preprocessor)


def write_configuration(
    folder: Path, models: Path, length: int, samples: int, ranks: int, steps: int
) -> Path:
    """``folder/alignkd.yaml``: ``steps`` optimizer steps of one micro-batch of ``samples`` per rank, each
    sample ``length`` embedding tokens long, with one image. Teacher and student as `alignkd plan` would have
    them where memory allows."""
    folder.mkdir(parents=True)
    entries = sample_entries(models, length, count=steps * samples * ranks)
    (folder / "samples.json").write_text(json.dumps(entries), encoding="utf-8")
    document = {
        "model": {name: str(models / name) for name in ("teacher", "student")},
        "data": {
            "sources": [{"file": "samples.json", "image_folder": str(models / "images")}],
            "max_length": length,
            "workers": 1,
        },
        "training": {
            "global_batch_size": samples * ranks,
            "micro_batch_size": samples,
            "precision": "fp32",
            "gradient_checkpointing": False,
        },
        "teacher": {"placement": "replicated"},
        "checkpoint": {"every": max(steps // SAVES, 1), "keep_last": 1},
    }
    path = folder / "alignkd.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def sample_entries(models: Path, length: int, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """One question and one answer each; the answer takes half of the tokens that follow the image."""
    tokenizer = SentencePieceProcessor(model_file=str(models / "student" / "tokenizer.model"))
    words = _single_tokens(tokenizer)
    rng = np.random.default_rng(seed)
    # A first guess at what the template adds; the difference is then taken out of the question.
    asked = answered = (length - VISION_TOKENS) // 2
    asked -= _embedding_tokens(models, _entry(0, words, asked, answered, rng)) - length
    if asked < 1:
        raise SystemExit(f"{length} tokens leave no room for a question beside the image; valid: more")
    return [_entry(number, words, asked, answered, rng) for number in range(count)]


def _entry(
    number: int, words: Sequence[str], asked: int, answered: int, rng: np.random.Generator
) -> dict[str, Any]:
    # A word is encoded differently behind a line break: the first one is always the same.
    texts = ([words[0], *rng.choice(words, size=max(size - 1, 0))] for size in (asked, answered))
    question, answer = (" ".join(text) for text in texts)
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": str(number), "image": f"{number % IMAGES}.jpg", "conversations": turns}


def _single_tokens(tokenizer: SentencePieceProcessor) -> list[str]:
    """Words that are one token each, in whatever order: some neighbours ("top left") are one piece."""
    pieces = [tokenizer.id_to_piece(number) for number in range(tokenizer.get_piece_size())]
    words: list[str] = []
    for word in (piece[1:] for piece in pieces if piece.startswith("\u2581") and piece[1:].isalpha()):
        texts = [f"{word} {other} {word}" for other in (word, *words)]
        if all(len(tokenizer.encode(text)) == 3 for text in texts):
            words.append(word)
    return words


def _embedding_tokens(models: Path, entry: dict[str, Any]) -> int:
    from alignkd.data.records import parse_sample
    from alignkd.data.templates import encode
    from alignkd.data.tokenizer import SentencePieceTokenizer

    record = parse_sample(entry, "samples.json", 0, 0)
    encoded = encode(record.turns, "v1", SentencePieceTokenizer.from_folder(models / "student"))
    return len(encoded.ids) - 1 + VISION_TOKENS  # one id stands for the image
