"""The plan of a run that reads a cache of the teacher."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from alignkd.config import Config, load_config
from alignkd.data.collate import ExpandedExample
from alignkd.data.records import parse_sample
from alignkd.models.configuration import read_model_config
from alignkd.models.encoding import student_encoder
from alignkd.models.families.mobilevlm_parts import MobileVLMParts
from alignkd.run_folder.atomic_files import write_json
from alignkd.teacher.cache_forms import to_fp8
from alignkd.teacher.cache_top_k import TeacherHead, to_top_k
from alignkd.teacher_cache.folder import CachePaths, Identity, Manifest, Shard
from launcher.plan.advice import advise
from launcher.plan.as_dict import plan_as_dict
from launcher.plan.cached import cache_figures, cache_lines
from launcher.plan.plan import Plan, make_plan
from launcher.plan.roofline import CHIPS
from launcher.plan.sharding import teacher_size
from launcher.plan.sizes import held_sizes, run_sizes
from launcher.plan.workload import Cluster
from tests import vlm
from tests.launcher.plan import test_advice
from tests.tiny import TEACHER

config = test_advice.config  # the fixture: a 7B teacher and a 1.7B student


def cached(given: Config, folder: Path) -> Config:
    teacher = given.teacher.model_copy(update={"placement": "cached", "cache": str(folder)})
    return given.model_copy(update={"teacher": teacher})


def lines_of(plan: Plan) -> list[str]:
    return list(cache_lines(plan, CHIPS["h100"]))


def test_a_rank_holds_what_the_model_without_layers_has(make_config, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = MobileVLMParts(read_model_config(TEACHER))
    run = cached(make_config(), tmp_path)
    held = held_sizes(run, run_sizes(run)).teacher
    assert held is not None
    assert held.tensors == {name: value.numel() for name, value in model.named_parameters()}


def test_the_plan_of_a_finished_cache_says_size_rate_and_savings(config: Config, tmp_path: Path) -> None:
    identity = Identity({}, (), "", 4096, samples=1000, shard_samples=1000, entries="", form="exact", top_k=0)
    manifest = Manifest(identity, (Shard(400_000, 0, ""),))
    write_json(CachePaths(tmp_path).manifest, manifest.as_json())
    plan = make_plan(cached(config, tmp_path), Cluster(2, 8))
    size, rate, savings = lines_of(plan)
    assert size == "Cache of the teacher: 3.28 GB for 1,000 samples (3.28 MB each)."  # 8,192 bytes a position
    assert rate.startswith("Read per optimizer step: 0.419 GB by all ranks; in steps")
    other = make_plan(config, Cluster(2, 8))
    assert f"{other.received / 1e9 - plan.received / 1e9:,.2f} GB to each GPU per step" in savings
    share = int(re.findall(r"\((\d+)%\)", savings)[0]) / 100
    assert share == pytest.approx(1 - plan.compute.flops / other.compute.flops, abs=0.006)
    assert 0.5 < share < 0.6  # 6.5 of 6.5 + 4 x 1.3, without head, tower and projector
    # Head, embeddings, projector, queries and keys of a layer, and the tower.
    whole = 262 + 262 + 42 + 67 + 608
    assert test_advice.part(plan, "teacher, whole") * 2**30 / 1e6 == pytest.approx(whole, rel=0.01)
    assert lines_of(other) == []
    found = plan_as_dict(plan, None, None, CHIPS["h100"])["cache"]
    assert (found["samples"], found["positions"], found["is_exact"]) == (1000, 400_000, True)
    assert found["bytes"] == 400_000 * 8192
    assert found["step_bytes"] == pytest.approx(128 * 400 * 8192)
    assert f"without any waiting {found['read_rate'] / 1e9:,.3f} GB/s." in rate
    assert found["compared"] == "zero3"
    assert found["saved_flops"] == other.compute.flops - plan.compute.flops
    assert found["saved_share"] == pytest.approx(share, abs=0.006)
    assert found["saved_memory"] == other.needed - plan.needed
    assert found["saved_received"] == other.received - plan.received
    assert found["form"] == "exact"
    assert plan_as_dict(other, None, None, CHIPS["h100"])["cache"] is None


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_fp8_takes_a_byte_for_each_number_and_four_for_each_position(
    make_config, tmp_path: Path, precision: str
) -> None:
    identity = Identity({}, (), "", 4096, samples=10, shard_samples=10, entries="", form="exact", top_k=0)
    write_json(CachePaths(tmp_path).manifest, Manifest(identity, (Shard(300, 0, ""),)).as_json())
    run = cached(make_config(f"teacher.precision={precision}", "teacher.cache_form=fp8"), tmp_path)
    plan = make_plan(run, Cluster(1, 1))
    found = plan_as_dict(plan, None, None, CHIPS["h100"])["cache"]
    stored = to_fp8(torch.randn(300, read_model_config(TEACHER).hidden_size))
    assert found["bytes"] == sum(tensor.nbytes for tensor in stored.values())
    assert found["form"] == "fp8"
    assert lines_of(plan)[0].startswith("Cache of the teacher, fp8: ")


def plans_of_300_positions(make_config, folder: Path) -> tuple[Plan, Plan]:
    """From a cache in ``folder``: with exact hidden states, and with 16 tokens a position."""
    identity = Identity({}, (), "", 16, samples=10, shard_samples=10, entries="", form="exact", top_k=0)
    write_json(CachePaths(folder).manifest, Manifest(identity, (Shard(300, 0, ""),)).as_json())
    top_k = ("teacher.cache_form=top_k", "teacher.cache_top_k=16", "distillation.divergence=forward_kl")
    exact, tokens = (
        make_plan(cached(make_config(*settings), folder), Cluster(1, 1)) for settings in ((), top_k)
    )
    return exact, tokens


def test_top_k_tokens_take_six_bytes_each_and_two_for_the_rest_and_spare_the_head(
    make_config, tmp_path: Path
) -> None:
    exact, run = plans_of_300_positions(make_config, tmp_path)
    found = plan_as_dict(run, None, None, CHIPS["h100"])["cache"]
    shapes = read_model_config(TEACHER)
    head = TeacherHead(torch.randn(shapes.vocab_size, 8), 16, 1.0)
    stored = sum(tensor.nbytes for tensor in to_top_k(torch.randn(300, 8), head).values())
    assert found["bytes"] == stored == 300 * (16 * 6 + 2)
    assert lines_of(run)[0].startswith("Cache of the teacher, top_k: ")
    with torch.device("meta"):
        parts = MobileVLMParts(shapes, has_head=False)
    assert run.held.teacher is not None
    assert run.held.teacher.tensors == {name: value.numel() for name, value in parts.named_parameters()}
    less = 2.0 * run.work.supervised * shapes.vocab_size * shapes.hidden_size * run.compute.micro_batches
    assert exact.compute.teacher_flops - run.compute.teacher_flops == pytest.approx(less)
    of_step = {part.name: part.bytes for part in run.memory.parts}["cached top-k tokens of a step"]
    assert of_step == run.work.accumulation * run.work.supervised * (16 * 6 + 2)
    of_targets = (
        {part.name: part.bytes for part in plan.memory.parts}["teacher's targets"] for plan in (exact, run)
    )
    fewer = shapes.hidden_size * teacher_size(run.config) - (16 * 6 + 2)
    assert next(of_targets) - next(of_targets) == run.work.window * run.work.supervised * fewer


def test_the_roofline_of_top_k_has_no_head_of_the_teacher_and_its_read_rate_is_of_that_step(
    make_config, tmp_path: Path
) -> None:
    exact, run = (
        plan_as_dict(plan, None, None, CHIPS["h100"])
        for plan in plans_of_300_positions(make_config, tmp_path)
    )
    flops = [{cost["name"]: cost["flops"] for cost in plan["roofline"]["costs"]} for plan in (exact, run)]
    heads = "heads and logit losses"
    less = exact["compute"]["teacher_flops"] - run["compute"]["teacher_flops"]
    assert flops[0].pop(heads) - flops[1].pop(heads) == pytest.approx(less)
    assert less > 0
    assert flops[0] == flops[1]
    rate = run["cache"]["step_bytes"] / run["roofline"]["step_seconds"]
    assert run["cache"]["read_rate"] == pytest.approx(rate)


@pytest.mark.parametrize(("lookahead", "joined"), [(1, 0), (2, 2), (None, 4)])
def test_hidden_states_are_on_the_device_for_a_whole_step_and_joined_for_a_forward(
    make_config, tmp_path: Path, lookahead: int | None, joined: int
) -> None:
    run = make_config("training.global_batch_size=8", "training.micro_batch_size=2")
    run = cached(
        run.model_copy(update={"teacher": run.teacher.model_copy(update={"lookahead": lookahead})}), tmp_path
    )
    plan = make_plan(run, Cluster(1, 1))
    assert (plan.work.samples, plan.work.accumulation) == (2, 4)
    shapes = read_model_config(TEACHER)
    text = 2 * (run.data.max_length - shapes.vision_tokens)
    of_batch = text * shapes.hidden_size * {"fp32": 4, "bf16": 2}[run.training.precision]
    parts = {part.name: part for part in plan.memory.parts}
    whole = parts["cached hidden states of a step"]
    assert (whole.bytes, whole.phase, whole.in_host_memory) == (4 * of_batch, "always", False)
    found = parts.get("cached hidden states, joined")
    assert (0 if found is None else found.bytes) == joined * of_batch
    online = make_plan(make_config(), Cluster(1, 1))
    assert not any(part.name.startswith("cached") for part in online.memory.parts)


def test_without_a_cache_the_token_index_bounds_its_size(make_config, tmp_path: Path) -> None:
    plan = make_plan(cached(make_config(), tmp_path / "none"), Cluster(1, 1))
    size, rate, _ = lines_of(plan)
    assert re.match(r"Cache of the teacher: at most 0\.00 GB for 1 samples \(at most 0\.01 MB each; ", size)
    assert rate.startswith("Read per optimizer step: at most")
    assert not plan_as_dict(plan, None, None, CHIPS["h100"])["cache"]["is_exact"]


def test_the_bound_of_a_cache_holds_where_images_differ_in_their_tokens(tmp_path: Path) -> None:
    run = cached(load_config(vlm.write_configuration(tmp_path, "qwen3_vl")), tmp_path / "none")
    encoder, (source,) = student_encoder(run), run.data.sources
    text = 0
    for number, record in enumerate(vlm.RECORDS):
        example = encoder.encode(parse_sample(record, source.file, 0, number), source)
        assert isinstance(example, ExpandedExample)
        text += int(example.is_text.sum())
    found = cache_figures(make_plan(run, Cluster(1, 1)), CHIPS["h100"])
    assert found is not None
    assert text * 8 <= found.positions < 2 * text * 8


def test_data_that_are_missing_leave_the_size_unknown(make_config, tmp_path: Path) -> None:
    plan = make_plan(cached(make_config("data.sources.0.file=none.json"), tmp_path), Cluster(1, 1))
    (line,) = lines_of(plan)
    assert line.startswith("The size of the teacher's cache is unknown: ")
    assert "none.json" in line
    assert "none.json" in plan_as_dict(plan, None, None, CHIPS["h100"])["cache"]["problem"]


def test_the_advice_keeps_a_cached_teacher(config: Config, tmp_path: Path) -> None:
    advised = advise(make_plan(cached(config, tmp_path), Cluster(1, 8)), 80 * 2**30)
    assert advised is not None
    assert advised.config.teacher.placement == "cached"
