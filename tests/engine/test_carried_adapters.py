"""P_attn and P_V are carried from one stage to the next, on real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignkd.distributed.ranks import Ranks
from alignkd.engine.setup import prepare
from alignkd.models.adapters import seeded_adapters
from alignkd.models.building import full_tensors
from alignkd.models.configuration import read_model_config
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.progress import Progress
from tests import tiny
from tests.engine.test_training_run import train_run
from tests.ranks import RankPool


def adapters_at_the_start(ranks: Ranks, run: str) -> dict[str, torch.Tensor]:
    state = prepare(Path(run), ranks, Progress(Path(run), writes=False))
    state.loader.close()
    return {name: value.clone() for name, value in full_tensors(state.engine.module.adapters)}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_next_stage_starts_with_the_adapters_of_the_first(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    first = tiny.write_run(
        tmp_path / "first", 2, student__zero_stage=stage, training__max_steps=2, checkpoint__every=100
    )
    assert two_ranks.run(train_run, str(first)) == [0, 0]
    saved = load_file(RunPaths(first).adapters)
    random = seeded_adapters(read_model_config(tiny.TEACHER), read_model_config(tiny.STUDENT), 0).state_dict()
    assert saved.keys() == random.keys()
    assert not any(torch.equal(saved[name], random[name]) for name in saved)  # all of them were trained
    assert not any("adapter" in path.name for path in (first / "student").rglob("*"))
    second = tiny.write_run(
        tmp_path / "second",
        2,
        student__zero_stage=stage,
        model__student=str(first / "student"),
        model__adapters=str(first),
    )
    for carried in two_ranks.run(adapters_at_the_start, str(second)):
        assert carried.keys() == saved.keys()
        assert all(torch.equal(carried[name], saved[name]) for name in saved)


def test_adapters_of_other_models_are_refused(two_ranks: RankPool, tmp_path: Path) -> None:
    swapped = seeded_adapters(read_model_config(tiny.STUDENT), read_model_config(tiny.TEACHER), 0)
    save_file(swapped.state_dict(), tmp_path / "theirs.safetensors")
    run = tiny.write_run(tmp_path / "run", 2, model__adapters=str(tmp_path / "theirs.safetensors"))
    for message in two_ranks.run(train_run, str(run)):
        assert "theirs.safetensors: holds" in str(message)
        assert "these models need" in str(message)


def test_without_distillation_no_adapters_are_saved(two_ranks: RankPool, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run", 2, distillation__enabled=False, training__max_steps=1)
    assert two_ranks.run(train_run, str(run)) == [0, 0]
    assert not RunPaths(run).adapters.exists()
