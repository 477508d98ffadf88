"""Pairs of tiny models whose images are grids of vision tokens of different sizes: 2 x 2 for the student,
3 x 3 for the teacher, and for Qwen as many as a budget of pixels allows."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from tests import vlm


class Pair(NamedTuple):
    teacher: Path
    student: Path


SQUARE = {"height": 42, "width": 42}
# Of a family: settings of both processors, of the teacher's alone, and of its model.
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llava": ({}, {"size": {"shortest_edge": 42}, "crop_size": SQUARE}, {"image_size": 42}),
    "gemma3": ({}, {"size": SQUARE, "image_seq_length": 9}, {"image_size": 42, "mm_tokens_per_image": 9}),
    "internvl": (
        {"max_patches": 1},
        {"size": SQUARE, "image_seq_length": 9},
        {"image_size": (42, 42), "image_seq_length": 9},
    ),
    **dict.fromkeys(
        ("idefics3", "smolvlm"),
        (
            {"do_image_splitting": False},
            {"max_image_size": {"longest_edge": 42}, "image_seq_len": 9},
            {"image_size": 42},
        ),
    ),
    **dict.fromkeys(
        ("qwen2_5_vl", "qwen3_vl", "qwen3_5"),
        ({}, {"size": {"shortest_edge": 56 * 56, "longest_edge": 84 * 84}}, {}),
    ),
}
FAMILIES = tuple(CHANGES)


@functools.cache
def pair(family: str) -> Pair:
    both, teachers, model = CHANGES[family]
    return Pair(_folder(family, "teacher", both | teachers, model), _folder(family, "student", both, {}))


def _folder(family: str, role: str, settings: dict[str, Any], model: dict[str, Any]) -> Path:
    out = Path(tempfile.mkdtemp(prefix=f"alignkd-grids-{family}-{role}-"))
    atexit.register(shutil.rmtree, out, ignore_errors=True)
    shutil.copytree(vlm.folder(family, role), out, dirs_exist_ok=True)
    change_processor(out, **settings)
    if model:
        config = AutoConfig.from_pretrained(out)
        for key, value in model.items():
            setattr(config if hasattr(config, key) else config.vision_config, key, value)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            whole: Any = AutoModelForImageTextToText.from_config(config)
            for name, parameter in whole.named_parameters():
                if name.endswith("mm_input_projection_weight"):
                    torch.nn.init.normal_(parameter, std=0.3)  # gemma3's begins at zero
        whole.save_pretrained(out)
    return out


def change_processor(folder: Path, **settings: Any) -> None:
    """Each setting where it is: of the processor, or of its image half."""
    path = folder / "processor_config.json"
    document = json.loads(path.read_text())
    for key, value in settings.items():
        (document if key in document else document["image_processor"])[key] = value
    path.write_text(json.dumps(document))
