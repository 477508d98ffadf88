"""Which settings are advised for the published sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignkd.config import Config, load_config
from launcher.plan.advice import advise, changes, largest_micro_batch
from launcher.plan.plan import GIB, Plan, make_plan
from launcher.plan.workload import Cluster
from tests.models.test_configuration import PUBLISHED, SHAPE_KEYS, SIZES


@pytest.fixture
def config(config_file: Path, tmp_path: Path) -> Config:
    """7B teaches 1.7B at 2048 tokens: 128 samples a step, 2 a micro-batch."""
    overrides = ["training.precision=bf16", "training.global_batch_size=128"]
    for key, (_, shape, _) in (("teacher", SIZES[2]), ("student", SIZES[0])):
        (tmp_path / key).mkdir()
        values = PUBLISHED | dict(zip(SHAPE_KEYS, shape, strict=True))
        (tmp_path / key / "config.json").write_text(json.dumps(values))
        overrides.append(f"model.{key}={tmp_path / key}")
    return load_config(config_file, overrides)


def part(plan: Plan, name: str) -> float:
    """GiB of the parts of this name, host or device."""
    return max(part.bytes for part in plan.memory.parts if part.name == name) / GIB


def test_the_published_sizes_are_plausible(config: Config) -> None:
    alone = make_plan(config, Cluster(1, 1))
    assert part(alone, "teacher shard") == pytest.approx(7.063e9 * 2 / GIB, rel=0.01)
    # 2 bytes of weights; 4 of gradients, 4 of fp32 weights, 8 of moments for each that is trained
    states = sum(part(alone, name) for name in ("gradients", "fp32 weights", "AdamW's two moments"))
    assert states == pytest.approx(16 * 1.379e9 / GIB, rel=0.01)
    spread = make_plan(config, Cluster(2, 8))
    assert part(spread, "teacher shard") == pytest.approx(part(alone, "teacher shard") / 16, rel=0.01)
    assert part(spread, "student's weights") == part(alone, "student's weights")  # stage 2
    assert spread.needed < alone.needed / 3
    # A forward of 7e9 and 4 of 1.2e9 weights, two operations each.
    assert alone.compute.flops / alone.compute.tokens == pytest.approx(2 * (6.5e9 + 4 * 1.3e9), rel=0.2)


@pytest.mark.parametrize(
    ("nodes", "gpus", "memory", "placement", "stage"),
    [
        (1, 8, 80, "replicated", 2),  # nothing to gather where the teacher fits whole
        (2, 8, 16, "zero3_node", 2),  # gathers stay inside a node where its GPUs hold the teacher
        (4, 2, 18, "zero3", 2),  # half a teacher would leave little room
        (4, 2, 14, "zero3", 3),  # and here the student's weights are split, too
    ],
)
def test_advice(config: Config, nodes: int, gpus: int, memory: int, placement: str, stage: int) -> None:
    plan = make_plan(config, Cluster(nodes, gpus))
    advised = advise(plan, memory * GIB)
    assert advised is not None
    assert advised.fits(memory * GIB)
    assert (advised.config.teacher.placement, advised.config.student.zero_stage) == (placement, stage)
    assert not advised.config.student.offload
    # Followed, it has nothing more to say.
    again = advise(advised, memory * GIB)
    assert again is not None
    assert changes(advised, again) == {}


def test_host_memory_and_the_end_of_advice(config: Config) -> None:
    plan = make_plan(config, Cluster(1, 1))
    advised = advise(plan, 24 * GIB)
    assert advised is not None
    assert advised.config.student.offload
    assert advised.memory.host > 12e9
    assert advise(plan, 4 * GIB) is None
    assert largest_micro_batch(plan, 4 * GIB) is None


def test_a_token_budget_is_advised_in_tokens(config: Config) -> None:
    budget = config.training.model_copy(update={"tokens_per_micro_batch": 2048})
    plan = make_plan(config.model_copy(update={"training": budget}), Cluster(1, 8))
    assert (plan.work.samples, plan.work.accumulation) == (1, 16)
    advised = advise(plan, 80 * GIB)
    assert advised is not None
    assert changes(plan, advised)["training.tokens_per_micro_batch"] >= 8192
    assert advised.config.training.micro_batch_size == config.training.micro_batch_size
