"""However a global batch is split over ranks and accumulation, at every ZeRO stage: the same step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkd.config import load_config
from alignkd.distributed.ranks import Ranks
from alignkd.engine.build import build_student_engine
from alignkd.engine.optimizer_step import all_reduce_step_info, run_optimizer_step
from alignkd.engine.signals import StopRequest
from alignkd.engine.stopwatch import Stopwatch
from alignkd.models.building import BuildOptions, full_tensors
from alignkd.teacher.provider import ReplicatedTeacher
from tests import tiny
from tests.engine.spy import EngineSpy, reported_loss
from tests.ranks import RankPool

# Ragged, text-only, without samples, and very different numbers of supervised positions.
MICRO_BATCHES = [
    ("v1",),
    ("text",),
    ("rounds",),
    ("plain",),
    (),
    ("v1", "text"),
    ("text", "text"),
    ("rounds",),
]


def one_step(ranks: Ranks, run: str) -> dict[str, Any]:
    config = load_config(Path(run) / "config.yaml")
    engine = EngineSpy(
        build_student_engine(config, json.loads((Path(run) / "ds/student.json").read_text()), ranks)[0]
    )
    teacher = ReplicatedTeacher(str(tiny.TEACHER), 16, BuildOptions(torch.float32))
    window = [tiny.batch_of(*cases) for cases in MICRO_BATCHES[ranks.rank :: ranks.world_size]]
    info = all_reduce_step_info(window, engine.module.sizes(), StopRequest(), ranks)
    sums = run_optimizer_step(engine, teacher, window, info, config.distillation, ranks, Stopwatch())
    torch.distributed.all_reduce(sums.terms)
    reported = reported_loss(sums, info, config.distillation)
    assert engine.minimised(ranks) == pytest.approx(reported, rel=1e-5)
    return {
        "sums": sums.terms,
        "norm": float(sums.gradient_norm),
        "elements": info.elements,
        "gradients": engine.gradients,
        "weights": {name: value.clone() for name, value in full_tensors(engine.module)},
    }


@pytest.fixture(scope="module")
def reference(one_rank: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_one_step(one_rank, tmp_path_factory.mktemp("reference") / "run", zero_stage=0)


def run_one_step(pool: RankPool, run: Path, zero_stage: int) -> dict[str, Any]:
    # A limit far below the norm, so that clipping has an effect.
    tiny.write_run(
        run,
        pool.world_size,
        training__micro_batch_size=1,
        training__max_gradient_norm=0.5,
        student__zero_stage=zero_stage,
    )
    return pool.run(one_step, str(run))[0]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_every_split_and_stage_gives_the_same_gradients_and_weights(
    request: pytest.FixtureRequest,
    reference: dict[str, Any],
    tmp_path: Path,
    world_size: int,
    zero_stage: int,
) -> None:
    """1 x 8, 2 x 4 and 4 x 2 (ranks x accumulation)."""
    pool = request.getfixturevalue({1: "one_rank", 2: "two_ranks", 4: "four_ranks"}[world_size])
    result = run_one_step(pool, tmp_path / "run", zero_stage)
    assert result["elements"] == reference["elements"]
    torch.testing.assert_close(result["sums"], reference["sums"], rtol=1e-6, atol=1e-6)
    assert result["norm"] == pytest.approx(reference["norm"], rel=1e-5)
    assert result["norm"] > 1.0, "clipping must have something to clip"
    assert result["gradients"].keys() == reference["gradients"].keys()
    for name, expected in reference["gradients"].items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            result["gradients"][name], expected, rtol=1e-4, atol=max(1e-5 * scale, 1e-9), msg=name
        )
    for name, expected in reference["weights"].items():
        # AdamW's first step is +-rate x sign(gradient): gradients next to zero may differ in sign.
        differs = (result["weights"][name] - expected).abs() > 1e-5
        assert differs.float().mean() < 0.01, name
