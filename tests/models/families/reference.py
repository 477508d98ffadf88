"""Equations 1 to 7 in float64 from what transformers itself returns, one sample at a time, without our
code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from alignkd.models.families.processors import read_processor
from tests import vlm_models
from tests.losses import resampling


@dataclass(frozen=True)
class Whole:
    """One sample: attention of the first layer [H, L, L], merged embeddings [L, D], logits [L, W]."""

    attention: torch.Tensor
    embeddings: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class Found:
    """Where a sample's things are, read off the text that the processor expanded."""

    ids: list[int]
    columns: list[list[int]]  # per image
    text: list[int]  # columns of text tokens
    supervised: list[int]  # columns


def run_whole(folder: Path, records: Sequence[dict[str, Any]], images: Path) -> list[Whole]:
    processor = read_processor(folder)
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    answers = []
    for record in records:
        inputs = natural_inputs(processor, record, images)
        for name, value in inputs.items():
            inputs[name] = value.double() if value.is_floating_point() else value
        with torch.no_grad():
            output = model(**inputs, output_attentions=True, output_hidden_states=True)
        first = next(one for one in output.attentions if one is not None)
        answers.append(Whole(first[0], output.hidden_states[0][0], output.logits[0]))
    return answers


def natural_inputs(processor: Any, record: dict[str, Any], images: Path) -> dict[str, torch.Tensor]:
    """What a user of transformers would give to the model."""
    text = expanded_text(record).replace(vlm_models.IMAGE, processor.image_token)
    opened = [Image.open(images / path).convert("RGB") for path in record["image"]]
    return dict(processor(text=[text], images=[opened] if opened else None, return_tensors="pt"))


def expanded_text(record: dict[str, Any]) -> str:
    """By hand, as ``vlm_models.TEMPLATE`` writes it."""
    text = ""
    for turn in record["conversations"]:
        role = "user" if turn["from"] == "human" else "assistant"
        value = turn["value"].replace("<image>\n", "<image>")
        text += f"<|im_start|>{role}\n{value}<|im_end|>\n"
    return text


def find(folder: Path, record: dict[str, Any], images: Path) -> Found:
    """Images are told apart by what ends one: two images of a record have text between them."""
    processor = read_processor(folder)
    ids = natural_inputs(processor, record, images)["input_ids"][0].tolist()
    names = processor.tokenizer.convert_ids_to_tokens(ids)
    layout = [name in vlm_models.LAYOUT_TOKENS for name in names]
    is_image = [name == vlm_models.IMAGE for name in names]
    columns: list[list[int]] = []
    inside = False
    for column, name in enumerate(names):
        if is_image[column] or layout[column] or (inside and set(name) == {"Ċ"}):
            if not inside:
                columns.append([])
            inside = True
            if is_image[column]:
                columns[-1].append(column)
        else:
            inside = False
    # Gemma3 writes two newlines before and two behind an image.
    newlines = 2 if type(processor).__name__ == "Gemma3Processor" else 0
    in_image = set()
    for image in columns:
        before = image[0] - 1
        while before >= 0 and layout[before]:
            before -= 1
        after = image[-1] + 1
        while after < len(ids) and layout[after]:
            after += 1
        in_image |= set(range(before + 1 - newlines, after + newlines))
    text = [column for column in range(len(ids)) if column not in in_image]
    supervised, answering = [], False
    for column, name in enumerate(names):
        if answering:
            supervised.append(column)
        if names[column - 1 : column + 1] and "".join(names[: column + 1]).endswith("<|im_start|>assistantĊ"):
            answering = True
        if name == "<|im_end|>":
            answering = False
    return Found(ids, columns, text, supervised)


def grids(folder: Path, record: dict[str, Any], images: Path) -> list[tuple[int, int]]:
    """(rows, columns) of each image's vision tokens, of a model that makes one grid of it."""
    sizes = natural_inputs(read_processor(folder), record, images).get("image_grid_thw")
    if sizes is not None:
        return [(int(rows) // 2, int(columns) // 2) for _, rows, columns in sizes]  # 2 x 2 patches are one
    sides = [round(len(columns) ** 0.5) for columns in find(folder, record, images).columns]
    return [(side, side) for side in sides]


def sums(
    teacher: Whole,
    student: Whole,
    found: Found,
    adapters: Any,
    tokens: int,
    top_k: int,
    seen: Found | None = None,
    grids: Sequence[tuple[tuple[int, int], tuple[int, int]]] = (),
) -> dict[str, float]:
    """Sums of all terms of one sample. ``tokens``: real size of the vocabulary. For a teacher with other
    grids, ``seen`` is what it finds in the sample, and ``grids`` has its and the student's for each image."""
    seen = seen or found
    weight, bias = adapters.attention.weight, adapters.attention.bias
    total = dict.fromkeys(("ce", "divergence", "attention", "vision_all", "vision_focus"), 0.0)
    for number, (image, taught) in enumerate(zip(found.columns, seen.columns, strict=True)):
        rows = [column for column in found.text if column > image[-1]]
        their_rows = [column for column in seen.text if column > taught[-1]]
        ours = student.attention[:, rows][:, :, image]
        theirs, embedded = teacher.attention[:, their_rows][:, :, taught], teacher.embeddings[taught]
        if grids:
            theirs = resampling.attention(theirs, *grids[number])
            embedded = resampling.tokens(embedded, *grids[number])
        mapped = torch.einsum("ht,trv->hrv", weight, theirs) + bias[:, None, None]
        total["attention"] += float((ours - mapped).square().sum())
        squares = (adapters.vision(embedded) - student.embeddings[image]).square().sum(-1)
        total["vision_all"] += float(squares.sum())
        if rows:
            best = theirs.mean(0).sum(0).topk(min(top_k, len(image))).indices
            total["vision_focus"] += float(squares[best].sum())
    for column, their_column in zip(found.supervised, seen.supervised, strict=True):
        log_p = student.logits[column - 1, :tokens].log_softmax(-1)
        log_q = teacher.logits[their_column - 1, :tokens].log_softmax(-1)
        total["ce"] -= float(log_p[found.ids[column]])
        total["divergence"] += float((log_p.exp() * (log_p - log_q)).sum())
    return total
