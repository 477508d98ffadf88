"""Folders of tiny random models of transformers' families, as a hub would have them, and data for them."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from alignkd.config import load_config
from tests import tiny
from tests.vlm_models import BUILDERS, new_tokenizer
from tests.vlm_untried import UNTRIED

FAMILIES = tuple(BUILDERS)


@functools.cache
def folder(family: str, role: str = "student") -> Path:
    """Of a teacher or a student, which differ in heads and width."""
    out = Path(tempfile.mkdtemp(prefix=f"alignkd-{family}-{role}-"))
    atexit.register(shutil.rmtree, out, ignore_errors=True)
    tokenizer = new_tokenizer()
    model, processor = (BUILDERS | UNTRIED)[family]
    with torch.random.fork_rng():
        torch.manual_seed(0 if role == "student" else 1)
        model(tokenizer, role == "teacher").save_pretrained(out)
    processor(tokenizer).save_pretrained(out)
    return out


def token_count() -> int:
    return len(new_tokenizer())


def write_images(out: Path) -> None:
    """``0.png`` to ``2.png``, of different sizes and contents."""
    generator = np.random.default_rng(0)
    for number, (width, height) in enumerate([(40, 30), (30, 60), (28, 28)]):
        pixels = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(out / f"{number}.png")


def _record(name: str, images: list[str], *turns: str) -> dict[str, Any]:
    speakers = ("human", "gpt")
    conversation = [{"from": speakers[n % 2], "value": text} for n, text in enumerate(turns)]
    return {"id": name, "image": images, "conversations": conversation}


RECORDS = (
    _record("two turns", ["0.png"], "<image>\nwhat colour", "red", "and this", "blue green"),
    _record("text", [], "the answer", "is many more words"),
    _record("two images", ["1.png", "2.png"], "first <image> then <image> what", "yellow"),
)


def write_configuration(out: Path, family: str) -> Path:
    """``alignkd.yaml`` and its data in ``out``: 24 samples, a third of them without an image, 6 steps."""
    write_images(out)
    records = [dict(record, id=f"{record['id']}-{n}") for n in range(8) for record in RECORDS]
    (out / "data.json").write_text(json.dumps(records))
    document = {
        "model": {"teacher": str(folder(family, "teacher")), "student": str(folder(family))},
        "data": {
            "sources": [{"file": "data.json", "image_folder": ".", "template": "chat"}],
            "workers": 0,
        },
        "training": {
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "learning_rate": 1e-3,
            "precision": "fp32",
            "packing": False,
        },
        "distillation": {"top_k": 6},
        "checkpoint": {"every": 2},
    }
    path = out / "alignkd.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def write_run(out: Path, world_size: int, family: str, **changes: Any) -> Path:
    """A run folder as the launcher writes it; ``changes`` as for ``tiny.write_run``."""
    out.mkdir(parents=True)
    overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
    return tiny.write_run_of(load_config(write_configuration(out, family), overrides), out, world_size)
