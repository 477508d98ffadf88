"""A folder of a transformers family that one rank cannot read."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from alignkd.distributed.ranks import Ranks
from alignkd.errors import AlignkdError
from alignkd.models.building import BuildOptions
from alignkd.models.loading import load_model
from tests import vlm
from tests.ranks import RankPool
from tests.teacher.test_sharded_teacher import ds_config


def error_of(_ranks: Ranks, folder: str) -> tuple[str, str]:
    try:
        load_model(folder, BuildOptions(torch.float32, zero3=ds_config("fp32")))
    except AlignkdError as error:
        return type(error).__name__, str(error)
    return "", ""


def test_weights_that_the_first_rank_cannot_read_end_all_ranks_of_a_sharded_model(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(vlm.folder("llava"), tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    (kind, own), (same_kind, elsewhere) = two_ranks.run(error_of, str(folder), timeout=60)
    assert kind == same_kind == "CheckpointError"
    assert own.startswith(f"{folder}: its weights cannot be loaded: ")
    assert elsewhere == f"rank 0: {own}"
