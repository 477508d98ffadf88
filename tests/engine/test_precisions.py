"""Precisions and offload through DeepSpeed's own engines: clipping, sums of micro-batches, skipped steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file

from alignkd.distributed.ranks import Ranks
from alignkd.engine.optimizer_step import all_reduce_step_info, run_optimizer_step
from alignkd.engine.setup import prepare
from alignkd.engine.signals import StopRequest
from alignkd.engine.stopwatch import Stopwatch
from alignkd.engine.trainer import Trainer
from alignkd.errors import AlignkdError
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.progress import Progress
from tests import tiny
from tests.engine.spy import first_step
from tests.ranks import RankPool

CLIP = 0.5


def first_moment_norm(ranks: Ranks, run: str) -> tuple[float, float]:
    """(norm of the gradient as it is reported, norm of Adam's first moment) after one step on one rank."""
    job = prepare(Path(run), ranks, Progress(Path(run), writes=False))
    with job.loader:
        window = next(iter(job.loader))
    info = all_reduce_step_info(window, job.engine.module.sizes(), StopRequest(), ranks)
    sums = run_optimizer_step(
        job.engine, job.teacher, window, info, job.config.distillation, ranks, Stopwatch()
    )
    base = getattr(job.engine.optimizer, "optimizer", job.engine.optimizer)
    squares = sum(float(state["exp_avg"].double().square().sum()) for state in base.state.values())
    return float(sums.gradient_norm), squares**0.5


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")],
)
def test_gradients_are_clipped_before_the_optimizer_sees_them(
    one_rank: RankPool, tmp_path: Path, stage: int, precision: str
) -> None:
    run = tiny.write_run(
        tmp_path / "run",
        1,
        student__zero_stage=stage,
        training__precision=precision,
        training__max_gradient_norm=CLIP,
    )
    ((reported, moment),) = one_rank.run(first_moment_norm, str(run))
    assert reported > 2 * CLIP, "clipping must have something to clip"
    # The first moment after one step is (1 - 0.9) times the gradient that the optimizer was given.
    assert moment == pytest.approx(0.1 * CLIP, rel=0.01)


@pytest.mark.parametrize("stage", [2, 3])
def test_micro_batches_are_summed_in_fp32(one_rank: RankPool, tmp_path: Path, stage: int) -> None:
    run = tiny.write_run(
        tmp_path / "run",
        1,
        student__zero_stage=stage,
        training__precision="bf16",
        training__micro_batch_size=1,
    )
    (found,) = one_rank.run(first_step, str(run))
    assert found["micro_batches"] == 8
    gradients = torch.cat([gradient.flatten().float() for gradient in found["gradients"].values()])
    summed = gradients[gradients != 0]
    # A sum kept in bf16 is one of its numbers. (With one rank and eight micro-batches, averaging is exact.)
    rounded = summed.bfloat16().float() == summed
    assert rounded.float().mean() < 0.5


def train(ranks: Ranks, run: str) -> Any:
    """(exit code or message, whether each step was applied, how far each step moved the head's weights)."""
    with pytest.MonkeyPatch.context() as patch:
        # DeepSpeed would refuse fp16 on a CPU, where it is only slow.
        patch.setattr(type(get_accelerator()), "is_fp16_supported", lambda _self: True)
        progress = Progress(Path(run), writes=ranks.is_first)
        state = prepare(Path(run), ranks, progress)
        trainer, engine, moved = Trainer(state, StopRequest(), progress), state.engine, []
        train_step = trainer._train_step

        def watched(*arguments: Any) -> None:
            before = own_part(engine.module.student.head.weight).clone()
            try:
                train_step(*arguments)
            finally:
                after = own_part(engine.module.student.head.weight)
                moved.append((engine.was_step_applied(), float((after - before).abs().max())))

        trainer._train_step = watched  # type: ignore[method-assign]
        try:
            return trainer.train(), moved
        except AlignkdError as error:
            return str(error), moved


def own_part(weight: torch.nn.Parameter) -> torch.Tensor:
    """At stage 3 a rank has a shard of it."""
    part: torch.Tensor = getattr(weight, "ds_tensor", weight).detach()
    return part


def set_loss_scale(run: Path, power: int) -> None:
    """The scale halves at every step that overflows."""
    path = RunPaths(run).student_deepspeed
    config = json.loads(path.read_text())
    config["fp16"] |= {"initial_scale_power": power, "hysteresis": 1}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("stage", [1, 2])
def test_fp16_skips_steps_that_overflow_and_then_trains(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    run = tiny.write_run(
        tmp_path / "run",
        2,
        student__zero_stage=stage,
        training__precision="fp16",
        training__epochs=3,
    )
    set_loss_scale(run, power=22)
    for code, moved in two_ranks.run(train, str(run)):
        assert code == 0
        applied = [was_applied for was_applied, _ in moved]
        assert not applied[0], "the loss scale is too large at first"
        assert all(applied[6:])
        assert [distance > 0 for _, distance in moved] == applied
    rows = tiny.metrics_rows(run)
    assert [row["step"] for row in rows] == list(range(1, 13))
    counted = [sum(not was_applied for was_applied in applied[: number + 1]) for number in range(12)]
    assert [row["skipped_steps"] for row in rows] == counted
    first = applied.index(True)
    assert rows[first]["loss"] == pytest.approx(rows[0]["loss"], rel=0.2)
    assert rows[-1]["loss"] < 0.95 * rows[0]["loss"]


def test_no_row_is_lost_when_too_many_steps_are_skipped(two_ranks: RankPool, tmp_path: Path) -> None:
    run = tiny.write_run(
        tmp_path / "run", 2, training__precision="fp16", training__max_skipped_steps=3, checkpoint__every=100
    )
    set_loss_scale(run, power=40)
    for message, moved in two_ranks.run(train, str(run)):
        assert "step 3: 3 optimizer steps in a row were skipped" in message
        assert moved == [(False, 0.0)] * 3
    assert [(row["step"], row["skipped_steps"]) for row in tiny.metrics_rows(run)] == [(1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_in_host_memory_takes_the_same_steps(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    runs = {}
    for offload in (False, True):
        run = tiny.write_run(
            tmp_path / f"offload-{offload}", 2, student__zero_stage=stage, student__offload=offload
        )
        assert [code for code, _ in two_ranks.run(train, str(run))] == [0, 0]
        runs[offload] = (tiny.metrics_rows(run), load_file(run / "student" / "model.safetensors"))
    (rows, weights), (other_rows, other_weights) = runs[False], runs[True]
    for row, other in zip(rows, other_rows, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert other["gradient_norm"] == pytest.approx(row["gradient_norm"], rel=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, rtol=1e-3, atol=1e-4, msg=name)
