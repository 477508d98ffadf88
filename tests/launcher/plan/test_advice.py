"""Which settings are advised for the published sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignkd.config import Config, load_config
from alignkd.data.micro_batches import split_by_tokens
from launcher.plan.advice import advise, changes, largest_micro_batch
from launcher.plan.plan import GIB, Plan, make_plan
from launcher.plan.workload import Cluster
from tests.models.test_configuration import PUBLISHED, SHAPE_KEYS, SIZES


@pytest.fixture
def config(config_file: Path, tmp_path: Path) -> Config:
    """A 7B teacher, a 1.7B student, 2048 tokens: 128 samples per step, 2 per micro-batch."""
    overrides = ["training.precision=bf16", "training.global_batch_size=128"]
    for key, (_, shape, _) in (("teacher", SIZES[2]), ("student", SIZES[0])):
        (tmp_path / key).mkdir()
        values = PUBLISHED | dict(zip(SHAPE_KEYS, shape, strict=True))
        (tmp_path / key / "config.json").write_text(json.dumps(values))
        overrides.append(f"model.{key}={tmp_path / key}")
    return load_config(config_file, overrides)


def part(plan: Plan, name: str) -> float:
    """GiB of the part of this name, in host or device memory."""
    return max(part.bytes for part in plan.memory.parts if part.name == name) / GIB


def test_the_plan_of_the_published_sizes_is_plausible(config: Config) -> None:
    alone = make_plan(config, Cluster(1, 1))
    assert part(alone, "teacher shard") == pytest.approx(7.063e9 * 2 / GIB, rel=0.01)
    # 2 bytes of weights; 4 of gradients, 4 of fp32 weights, 8 of moments for each trained parameter
    states = sum(part(alone, name) for name in ("gradients", "fp32 weights", "AdamW's two moments"))
    assert states == pytest.approx(16 * 1.379e9 / GIB, rel=0.01)
    spread = make_plan(config, Cluster(2, 8))
    assert part(spread, "teacher shard") == pytest.approx(part(alone, "teacher shard") / 16, rel=0.01)
    assert part(spread, "student's weights") == part(alone, "student's weights")  # stage 2
    assert spread.needed < alone.needed / 3
    # One forward of 7e9 weights and four of 1.2e9, with two operations per weight.
    assert alone.compute.flops / alone.compute.tokens == pytest.approx(2 * (6.5e9 + 4 * 1.3e9), rel=0.2)


@pytest.mark.parametrize(
    ("nodes", "gpus", "memory", "placement", "stage"),
    [
        (1, 8, 80, "replicated", 2),  # nothing to gather where the whole teacher fits
        (2, 8, 16, "zero3_node", 2),  # gathers stay inside a node where its GPUs hold the teacher
        (4, 2, 18, "zero3", 2),  # half a teacher would leave little memory
        (4, 2, 14, "zero3", 3),  # here the student's weights are sharded too
    ],
)
def test_the_advice_fits_and_has_no_further_advice(
    config: Config, nodes: int, gpus: int, memory: int, placement: str, stage: int
) -> None:
    plan = make_plan(config, Cluster(nodes, gpus))
    advised = advise(plan, memory * GIB)
    assert advised is not None
    assert advised.fits(memory * GIB)
    assert (advised.config.teacher.placement, advised.config.student.zero_stage) == (placement, stage)
    assert not advised.config.student.offload
    # The advised settings are themselves the best.
    again = advise(advised, memory * GIB)
    assert again is not None
    assert changes(advised, again) == {}


def test_settings_are_only_changed_for_a_gain(config: Config) -> None:
    """On one node zero3 and zero3_node are the same; checkpointing is dropped where memory allows."""
    advised = advise(plan := make_plan(config, Cluster(1, 8)), 20 * GIB)
    assert advised is not None
    assert "teacher.placement" not in changes(plan, advised)
    assert advised.config.training.gradient_checkpointing
    roomy = advise(plan, 80 * GIB)
    assert roomy is not None
    assert not roomy.config.training.gradient_checkpointing
    assert roomy.compute.flops < advised.compute.flops


def test_traffic_through_host_memory_is_that_of_offloaded_models(config: Config) -> None:
    def through_host(lookahead: int | None, offload: bool, placement: str) -> int:
        teacher = config.teacher.model_copy(update={"placement": placement, "lookahead": lookahead})
        student = config.student.model_copy(update={"offload": offload})
        changed = config.model_copy(update={"teacher": teacher, "student": student})
        return make_plan(changed, Cluster(1, 4)).through_host

    assert through_host(None, False, "zero3") == 0
    whole, head = 7.05e9 * 2 / 4, 131e6 * 2 / 4  # per rank
    assert through_host(None, False, "zero3_offload") == pytest.approx(whole - head, rel=0.01)
    # 128 samples are 16 micro-batches of 2 on each of 4 ranks; the head is kept from the first step.
    assert through_host(4, False, "zero3_offload") == pytest.approx(4 * (whole - head), rel=0.01)
    assert through_host(None, True, "zero3") == pytest.approx((16 + 1) * 1.379e9 * 2 / 4, rel=0.01)


def test_offloading_is_advised_before_giving_up(config: Config) -> None:
    plan = make_plan(config, Cluster(1, 1))
    advised = advise(plan, 24 * GIB)
    assert advised is not None
    assert advised.config.student.offload
    assert advised.memory.host > 12e9
    assert advise(plan, 4 * GIB) is None
    assert largest_micro_batch(plan, 4 * GIB) is None


def test_the_advice_for_a_token_budget_is_in_tokens(config: Config) -> None:
    budget = config.training.model_copy(update={"tokens_per_micro_batch": 2048})
    plan = make_plan(config.model_copy(update={"training": budget}), Cluster(1, 8))
    assert (plan.work.samples, plan.work.accumulation) == (1, 16)
    advised = advise(plan, 80 * GIB)
    assert advised is not None
    assert changes(plan, advised)["training.tokens_per_micro_batch"] >= 8192
    assert advised.config.training.micro_batch_size == config.training.micro_batch_size
    # A budget above a rank's share of the batch stays: shorter samples may fill it.
    budget = config.training.model_copy(update={"tokens_per_micro_batch": 100 * 2048})
    plan = make_plan(config.model_copy(update={"training": budget}), Cluster(4, 8))
    advised = advise(plan, 80 * GIB)
    assert advised is not None
    assert "training.tokens_per_micro_batch" not in changes(plan, advised)


@pytest.mark.parametrize(
    ("budget", "gpus", "samples", "accumulation"),
    [(2048 * 3, 8, 3, 6), (2048 * 64, 8, 16, 1), (1000, 8, 1, 16), (2048 * 3 + 2000, 32, 3, 2)],
)
def test_a_token_budget_holds_at_most_a_ranks_share(
    config: Config, budget: int, gpus: int, samples: int, accumulation: int
) -> None:
    """128 samples of 2048 tokens; the sampler cuts them into micro-batches of similar cost."""
    training = config.training.model_copy(update={"tokens_per_micro_batch": budget, "micro_batch_size": 1})
    plan = make_plan(config.model_copy(update={"training": training}), Cluster(1, gpus))
    assert (plan.work.samples, plan.work.accumulation) == (samples, accumulation)
    for rank in range(gpus):
        made = split_by_tokens([2048] * 128, budget, packed=True, ranks=gpus)[rank::gpus]
        assert len(made) <= accumulation
        assert all(len(part) <= samples for part in made)
    # Compute is counted once per sample, however full the micro-batches are.
    assert plan.compute.tokens * gpus == 128 * 2048
