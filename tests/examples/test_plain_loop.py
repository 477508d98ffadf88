"""The example of a training loop of one's own, with two tiny random models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from alignkd.models.adapters import seeded_adapters
from alignkd.models.loading import model_facts
from examples import plain_loop
from tests import vlm
from tests.models.families import reference

QUESTIONS = (
    ("0.png", "what colour", "red"),
    ("1.png", "and this", "blue green and more"),
    ("2.png", "a", "b"),
)
TERMS = ("ce", "divergence", "attention", "vision_all", "vision_focus")
WEIGHTS = dict(zip(TERMS, (1.0, 1.0, 1.0, 1.0, 0.1), strict=True))


def write_data(folder: Path) -> Path:
    vlm.write_images(folder)
    path = folder / "data.json"
    path.write_text(
        json.dumps([dict(zip(("image", "question", "answer"), q, strict=True)) for q in QUESTIONS])
    )
    return path


def expected_loss(folder: Path) -> float:
    """Of all samples as one batch before the first step, in float64 and without our code."""
    teacher, student = vlm.folder("llava", "teacher"), vlm.folder("llava")
    adapters = seeded_adapters(model_facts(teacher), model_facts(student), 0).double()
    records: list[dict[str, Any]] = [
        {
            "image": [image],
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer},
            ],
        }
        for image, question, answer in QUESTIONS
    ]
    theirs, ours = (reference.run_whole(one, records, folder) for one in (teacher, student))
    sums, counts = dict.fromkeys(TERMS, 0.0), dict.fromkeys(TERMS, 0)
    heads, width = model_facts(student).num_attention_heads, model_facts(student).hidden_size
    for record, one, other in zip(records, theirs, ours, strict=True):
        found = reference.find(student, record, folder)
        (image,) = found.columns
        rows = (
            sum(column > image[-1] for column in found.text) - 1
        )  # without the newline behind the end token
        cut = reference.Found(found.ids[:-1], found.columns, found.text[:-1], found.supervised)
        of_sample = reference.sums(one, other, cut, adapters, vlm.token_count(), plain_loop.TOP_K)
        sizes = (len(found.supervised), len(found.supervised), rows * len(image) * heads)
        sizes += (len(image) * width, min(plain_loop.TOP_K, len(image)) * width)
        for term, size in zip(TERMS, sizes, strict=True):
            sums[term] += of_sample[term]
            counts[term] += size
    return sum(WEIGHTS[term] * sums[term] / counts[term] for term in TERMS)


def test_the_loss_is_the_methods_and_falls_and_the_student_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_data(tmp_path), tmp_path / "out"
    folders = str(vlm.folder("llava", "teacher")), str(vlm.folder("llava"))
    losses = plain_loop.train(*folders, str(data), str(out), steps=12)
    assert losses[0] == pytest.approx(expected_loss(tmp_path), rel=1e-4)
    assert losses[-1] < losses[0]
    assert len(losses) == 12
    assert f"step 12: loss {losses[-1]:.4f}" in capsys.readouterr().out
    saved, start = (AutoModelForImageTextToText.from_pretrained(folder) for folder in (out, folders[1]))
    moved = {
        name for name, value in saved.named_parameters() if not torch.equal(value, start.get_parameter(name))
    }
    assert moved
    assert not any("vision_tower" in name for name in moved)
