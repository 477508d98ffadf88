"""A run resumed on another number of ranks, or at stage 1 instead of 2, equals the undisturbed run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import deepspeed
import pytest
import torch
from torch import nn

from alignkd.checkpoint.shard_files import attach_shard_files
from alignkd.checkpoint.storage import CLIENT_STATE
from alignkd.checkpoint.universal import run_deepspeed
from alignkd.checkpoint.universal_load import load_universal
from alignkd.distributed.ranks import Ranks
from alignkd.run_folder.checkpoints import (
    MANIFEST,
    UNIVERSAL,
    committed_steps,
    read_manifest,
)
from alignkd.run_folder.drift import saved_stage
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.verification import data_files
from tests import tiny
from tests.engine.test_training_run import train_run
from tests.ranks import RankPool
from tests.test_end_to_end import alignkd, finish, write_configuration

SAVED = 85
METRICS = ("loss", "ce", "reverse_kl", "attention", "vision_all", "vision_focus", "gradient_norm")


@pytest.fixture(scope="module")
def pools(one_rank: RankPool, two_ranks: RankPool, four_ranks: RankPool) -> dict[int, RankPool]:
    return {1: one_rank, 2: two_ranks, 4: four_ranks}


@pytest.fixture(scope="module")
def whole(two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody stopped, at stage 1."""
    run = tiny.write_run(
        tmp_path_factory.mktemp("whole") / "run", 2, student__zero_stage=1, training__epochs=2
    )
    assert two_ranks.run(train_run, str(run)) == [0, 0]
    return run


def assert_same_curve(run: Path, whole: Path) -> None:
    ours, expected = tiny.metrics_rows(run), tiny.metrics_rows(whole)
    assert [row["step"] for row in ours] == [row["step"] for row in expected]
    for mine, theirs in zip(ours, expected, strict=True):
        for name in METRICS:
            assert mine[name] == pytest.approx(theirs[name], abs=1e-5, rel=0), (mine["step"], name)
        for name in ("learning_rate", "projector_learning_rate", "adapter_learning_rate", "samples", "epoch"):
            assert mine[name] == theirs[name]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_resumed_on_4_then_2_then_1_then_4_ranks_is_the_same_run(
    pools: dict[int, RankPool], whole: Path, tmp_path: Path, stage: int
) -> None:
    run = tiny.write_run(tmp_path / "run", 4, student__zero_stage=stage, training__epochs=2)
    assert pools[4].run(train_run, str(run), 2) == [SAVED] * 4
    for world_size in (2, 1):
        tiny.resize_run(run, world_size)
        assert pools[world_size].run(train_run, str(run), 2) == [SAVED] * world_size
    tiny.resize_run(run, 4)
    assert pools[4].run(train_run, str(run)) == [0] * 4
    assert_same_curve(run, whole)


def test_a_run_resumed_at_stage_2_instead_of_1_and_back_is_the_same_run(
    pools: dict[int, RankPool], whole: Path, tmp_path: Path
) -> None:
    run = tiny.write_run(tmp_path / "run", 2, student__zero_stage=1, training__epochs=2)
    assert pools[2].run(train_run, str(run), 2) == [SAVED] * 2
    tiny.resize_run(run, 2, student__zero_stage=2)  # at the same size
    assert pools[2].run(train_run, str(run), 2) == [SAVED] * 2
    tiny.resize_run(run, 1, student__zero_stage=1)  # and at another one
    assert pools[1].run(train_run, str(run)) == [0]
    assert_same_curve(run, whole)
    # Retention takes a conversion along with its checkpoint: step-2.universal has gone.
    left = {path.name for path in RunPaths(run).checkpoints.iterdir()}
    assert left == {"step-4", "step-4.universal", "step-6", "step-8", "latest"}
    saved = [read_manifest(RunPaths(run).checkpoints / f"step-{step}") for step in (4, 6, 8)]
    assert [(m["world_size"], saved_stage(m)) for m in saved] == [(2, 2), (1, 1), (1, 1)]
    assert len({manifest["frozen"] for manifest in saved}) == 1


class SmallGroup(nn.Module):
    """17 elements are a parameter group of their own: on four ranks the last one has padding only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.vector = nn.Parameter(torch.ones(17))

    def forward(self, scale: torch.Tensor) -> torch.Tensor:
        return (self.linear(scale) ** 2).sum() + (self.vector * torch.arange(17.0)).pow(2).sum()


def train_small_group(_ranks: Ranks, load: Path | None, save: Path, steps: int) -> list[float]:
    torch.manual_seed(0)
    module = SmallGroup()
    groups = [{"params": list(module.linear.parameters())}, {"params": [module.vector]}]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    engine = deepspeed.initialize(model=module, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config)[
        0
    ]
    attach_shard_files(engine)
    if load is not None:
        load_universal(engine, load)
    losses = []
    for _ in range(steps):
        loss = engine(torch.ones(1, 8))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    engine.save_checkpoint(str(save.parent), save.name, client_state=dict(CLIENT_STATE), save_latest=False)
    return losses


def converted(source: Path) -> Path:
    target = source.with_suffix(UNIVERSAL)
    target.mkdir()
    run_deepspeed(source, target)
    (target / MANIFEST).write_text(json.dumps({"files": dict.fromkeys(data_files(target))}))
    return target


def test_a_rank_without_a_part_of_a_parameter_group_loads_a_conversion(
    pools: dict[int, RankPool], tmp_path: Path
) -> None:
    losses, before = [], None
    for world_size in (2, 4, 2):
        saved = tmp_path / f"after-{len(losses)}"
        losses += pools[world_size].run(train_small_group, before, saved, 3)[-1]
        before = converted(saved)
    assert losses == pytest.approx(pools[2].run(train_small_group, None, tmp_path / "whole", 9)[0], rel=1e-6)
    assert losses == sorted(losses, reverse=True)


def test_the_resume_command_changes_the_number_of_ranks(tmp_path: Path) -> None:
    """Two nodes to the end; back to an earlier step on one node: the same curve, and nothing is lost."""
    configuration = write_configuration(tmp_path)
    changes = ("checkpoint.every=2", "training.max_steps=6", "student.zero_stage=2")
    launched = alignkd(
        *("launch", "--nodes", "2", "--backend", "local", "--cpu", "--name", "run"),
        *(word for change in changes for word in ("--set", change)),
        cwd=configuration.parent,
    )
    assert "done: 6 steps" in finish(launched)
    run = tmp_path / "runs" / "run"
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    refused = alignkd("resume", str(run), "--step", "2", "--nodes", "3", cwd=tmp_path)
    assert "node counts that fit" in finish(refused)
    assert refused.returncode == 2
    assert committed_steps(run) == [6, 4, 2]
    resumed = alignkd("resume", str(run), "--step", "2", "--nodes", "1", cwd=tmp_path)
    output = finish(resumed)
    assert resumed.returncode == 0, output
    assert "step-6.set-aside" in output
    assert_same_curve(run, whole)
    steps = {"step-2", "step-2.universal", "step-4", "step-6", "step-4.set-aside", "step-6.set-aside"}
    assert {path.name for path in RunPaths(run).checkpoints.iterdir()} == steps | {"latest"}
