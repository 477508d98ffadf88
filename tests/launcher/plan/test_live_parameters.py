"""What ZeRO-3 holds gathered of a teacher, by its limits, against real engines on two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignkd.config import load_config
from alignkd.distributed.ranks import Ranks
from alignkd.engine.build import build_teacher
from alignkd.models.configuration import read_model_config
from launcher.plan.plan import make_plan
from launcher.plan.shapes import mobilevlm_shapes
from launcher.plan.sharding import alive_at_most, gathered
from launcher.plan.sizes import ModelSizes, run_sizes
from launcher.plan.workload import Cluster
from tests import tiny
from tests.ranks import RankPool

LIMITS = ((0, 0), (60_000, 20_000), (10**9, 10**9))  # on live parameters, and on a prefetch


def zero_section(live: int, prefetch: int) -> dict[str, Any]:
    return {
        "stage3_param_persistence_threshold": 1000,
        "stage3_prefetch_bucket_size": prefetch,
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": 0,
    }


def most_elements_gathered(ranks: Ranks, run: str) -> list[int]:
    """For each of the limits, in a forward after the one that DeepSpeed learns the order from."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    config = load_config(Path(run) / "config.yaml")
    values = json.loads((Path(run) / "ds" / "teacher.json").read_text())
    found = []
    for live, prefetch in LIMITS:
        values["zero_optimization"] |= zero_section(live, prefetch)
        provider = build_teacher(config, values, ranks)
        assert provider is not None
        counts: list[int] = []
        sharded = [parameter for parameter in provider.model.parameters() if not parameter.ds_persist]

        def count(*_: object, counts: list[int] = counts, sharded: list[Any] = sharded) -> None:
            held = (one.ds_numel for one in sharded if one.ds_status != ZeroParamStatus.NOT_AVAILABLE)
            counts.append(sum(held))

        for module in provider.model.modules():
            module.register_forward_hook(count)
        batch = tiny.batch_of("v1", packing=True)
        for _ in range(3):
            counts.clear()
            provider.targets(batch)
        found.append(max(counts))
    return found


def test_limits_on_live_parameters_hold_as_the_plan_says(two_ranks: RankPool, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run", 2)
    teacher = run_sizes(load_config(run / "config.yaml")).teacher
    assert teacher is not None
    for measured in two_ranks.run(most_elements_gathered, str(run)):
        for (live, prefetch), most in zip(LIMITS, measured, strict=True):
            predicted = gathered(teacher, zero_section(live, prefetch), ranks=2)
            assert 0.4 * predicted < most <= predicted, (live, measured, predicted)
        assert measured[0] < measured[1] < measured[2]


def published() -> ModelSizes:
    tensors = {f"language_model.layers.{number}.x": 200_000_000 for number in range(32)}
    shapes = mobilevlm_shapes(read_model_config(tiny.TEACHER))
    return ModelSizes(shapes, {"language_model.embed_tokens.weight": 131_000_000, **tensors}, "none.")


def test_a_gpu_that_is_behind_may_hold_all_that_is_gathered(tmp_path: Path) -> None:
    zero = zero_section(500_000_000, 50_000_000)
    assert gathered(published(), zero, ranks=8) == 500_000_000 + 200_000_000
    assert alive_at_most(published(), zero, ranks=8) == sum(published().tensors.values())
    assert alive_at_most(published(), zero, ranks=1) == 0
    assert alive_at_most(published(), zero | {"offload_param": {}}, ranks=1) > 0
    config = load_config(tiny.write_run(tmp_path / "run", 2) / "config.yaml")
    plan = make_plan(config, Cluster(1, 2))
    assert 0 < plan.memory.teacher_alive <= plan.sizes.teacher.count() * 4
    replicated = config.model_copy(
        update={"teacher": config.teacher.model_copy(update={"placement": "replicated"})}
    )
    assert make_plan(replicated, Cluster(1, 2)).memory.teacher_alive == 0
