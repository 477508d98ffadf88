"""``python -m alignkd.demo.phone_models``: what the demo for a phone trains, and how.

A trained tower of the published grid, the shapes of teacher and student, and their configuration.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from alignkd.data.sample_task import folders
from alignkd.data.sample_task.tokenizer import train_tokenizer
from alignkd.demo import phone_tower

CONFIGURATION = "alignkd.yaml"
SIZES = {"teacher": (96, 2, 3), "student": (64, 2, 2)}  # width, layers, heads


def model_config(width: int, layers: int, heads: int) -> dict[str, Any]:
    """That of the sample task, with the tower here and the published models' 12 x 12 vision tokens."""
    return folders.model_config(width, layers, heads) | {
        "max_position_embeddings": 512,  # two images take 288
        "mm_hidden_size": phone_tower.WIDTH,
        "mm_vision_tokens_per_side": phone_tower.GRID // 2,
    }


def main(
    out: Annotated[Path, typer.Option(help="Folder of the demo.")],
    seed: Annotated[int, typer.Option(help="Of the tower's training.")] = 0,
    steps: Annotated[int, typer.Option(help="Of the tower's training.")] = phone_tower.STEPS,
) -> None:
    """Write the configuration, and the folders of tower, teacher and student."""
    text = (resources.files("alignkd.demo") / "phone.yaml").read_text(encoding="utf-8")
    (out / CONFIGURATION).write_text(text, encoding="utf-8")
    tokenizer = train_tokenizer()
    for role, sizes in SIZES.items():
        folders.write_model_folder(out / "models" / role, model_config(*sizes), tokenizer)
    phone_tower.write_tower(out / "models" / folders.TOWER, seed, steps)


if __name__ == "__main__":
    typer.run(main)
