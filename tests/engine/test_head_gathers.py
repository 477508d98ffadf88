"""How often ZeRO-3 gathers the student's head.

Backward does not need it: its gradient is computed in forward. DeepSpeed would gather it for backward all the
same, but with the shipped ``stage3_max_reuse_distance`` it is kept from the forward just before. Only the
first backward of a run, which DeepSpeed traces, gathers it again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from alignkd.distributed.ranks import Ranks
from alignkd.engine.setup import prepare
from alignkd.engine.signals import StopRequest
from alignkd.engine.trainer import Trainer
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.progress import Progress
from tests import tiny
from tests.ranks import RankPool

GATHER = "_PartitionedParameterCoordinator__all_gather_params"


def gathers_of_the_head(ranks: Ranks, run: str) -> list[list[str]]:
    """For each step, where the head was gathered: "forward" or "backward"."""
    progress = Progress(Path(run), writes=ranks.is_first)
    trainer = Trainer(prepare(Path(run), ranks, progress), StopRequest(), progress)
    head = trainer.state.engine.module.student.head.weight
    gather, train_step, seen = getattr(PartitionedParameterCoordinator, GATHER), trainer._train_step, []

    def counted(coordinator: Any, parameters: Iterable[Any], forward: bool) -> Any:
        parameters = list(parameters)
        if any(parameter is head for parameter in parameters):
            seen[-1].append("forward" if forward else "backward")
        return gather(coordinator, parameters, forward)

    def counted_step(*arguments: Any) -> None:
        seen.append([])
        train_step(*arguments)

    trainer._train_step = counted_step  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartitionedParameterCoordinator, GATHER, counted)
        assert trainer.train() == 0
    return seen


def test_the_head_is_gathered_once_per_micro_batch(two_ranks: RankPool, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run", 2, student__zero_stage=3, training__max_steps=3)
    path = RunPaths(run).student_deepspeed
    config = json.loads(path.read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # tiny weights would stay gathered
    path.write_text(json.dumps(config))
    for first, *others in two_ranks.run(gathers_of_the_head, str(run)):
        assert first == ["forward", "backward", "forward"]
        assert others == [["forward", "forward"]] * 2
