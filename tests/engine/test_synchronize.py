"""How often DeepSpeed makes the host wait for the whole device in an optimizer step."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
from deepspeed.accelerator import get_accelerator

from alignkd.distributed.ranks import Ranks
from alignkd.engine.optimizer_step import all_reduce_step_info, run_optimizer_step
from alignkd.engine.setup import prepare
from alignkd.engine.signals import StopRequest
from alignkd.engine.stopwatch import Stopwatch
from alignkd.run_folder.progress import Progress
from tests import tiny
from tests.ranks import RankPool

STEPS = 4


def synchronizations(ranks: Ranks, run: str) -> list[int]:
    """Of each of four optimizer steps: the throughput timer begins with the third."""
    state = prepare(Path(run), ranks, Progress(Path(run), writes=True))
    counts: list[int] = []
    with state.loader:
        windows = iter(state.loader)
        for _ in range(STEPS):
            window = next(windows)
            info = all_reduce_step_info(window, state.engine.module.sizes(), StopRequest(), ranks)
            with patch.object(get_accelerator(), "synchronize") as synchronize:
                run_optimizer_step(
                    state.engine, state.teacher, window, info, state.config.distillation, ranks, Stopwatch()
                )
            counts.append(synchronize.call_count)
    return counts


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_never_synchronises_the_device(one_rank: RankPool, tmp_path: Path, stage: int) -> None:
    run = tiny.write_run(tmp_path / "run", 1, student__zero_stage=stage, training__precision="bf16")
    assert one_rank.run(synchronizations, str(run)) == [[0] * STEPS]
