"""Records as the authors encode them, and images as CLIP sees them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from PIL import Image

IGNORED = -100  # label of an unsupervised token
IMAGE = -200
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Sample:
    ids: list[int]  # with one IMAGE per image
    labels: list[int]
    pixels: list[torch.Tensor]  # [3, 336, 336] each


def read_sample(record: dict[str, Any], template: str, folder: Path, model_folder: Path) -> Sample:
    """A record of the data as the authors encode it."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_folder / "tokenizer.model"))
    ids, labels = [pieces.bos_id()], [IGNORED]

    def add(text: str, supervised: str = "") -> None:
        chunk = pieces.encode(text + supervised)
        asked = len(pieces.encode(text)) if text else 0
        ids.extend(chunk)
        labels.extend(chunk if supervised and not text else [IGNORED] * asked + chunk[asked:])

    def add_image() -> None:
        ids.append(IMAGE)
        labels.append(IGNORED)

    turns = [turn["value"] for turn in record["conversations"]]
    if template == "plain":
        add_image()
        add("", turns[1] + "\n")
    else:
        start = SYSTEM + " "
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            if question.count("<image>") == 1:
                question = "<image>\n" + question.replace("<image>", "").strip()
            *before, last = f"{start}USER: {question} ASSISTANT:".split("<image>")
            for text in before:
                add(text)
                add_image()
            add(last, " " + answer)
            ids.append(pieces.eos_id())
            labels.append(pieces.eos_id())
            start = ""
    names = record.get("image", [])
    names = [names] if isinstance(names, str) else names
    return Sample(ids, labels, [read_pixels(folder / name) for name in names])


def read_pixels(path: Path) -> torch.Tensor:
    """Padded to a square with the mean colour, scaled to 336 pixels, normalised: CLIP's numbers."""
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    deviation = np.array([0.26862954, 0.26130258, 0.27577711])
    image = Image.open(path).convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = np.asarray(square.resize((336, 336), Image.Resampling.BICUBIC)) / 255
    return torch.from_numpy((pixels - mean) / deviation).permute(2, 0, 1)
