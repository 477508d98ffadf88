"""The roofline's operations and bytes against those of the real modules, counted operation by operation."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alignkd.config.schema import Config, LoraSection
from alignkd.losses.attention import BlockLayout, fused_attention_loss, text_vision_block
from alignkd.losses.fused_logits import fused_logit_losses
from alignkd.losses.logits import LogitTargets
from alignkd.losses.top_tokens import TopTokens
from alignkd.models.configuration import MobileVLMConfig, read_model_config
from alignkd.models.families.mobilevlm import MobileVLM
from alignkd.models.lora import add_lora
from alignkd.models.tower import PUBLISHED_TOWER_CONFIG
from launcher.plan import activations
from launcher.plan import roofline as plan
from launcher.plan.compute import layer_flops, run_compute
from launcher.plan.memory import run_memory
from launcher.plan.shapes import mobilevlm_shapes
from launcher.plan.sharding import rendered
from launcher.plan.sizes import RunSizes, adapter_sizes, model_sizes
from launcher.plan.trained import Trained
from launcher.plan.workload import Cluster, Workload, workload
from tests import tiny

META = torch.device("meta")
WORK = Workload(samples=2, length=512, vision_tokens=144, accumulation=1, window=1)
# Products and fused attention are counted by their operations.
PRODUCTS = ("mm", "bmm", "addmm", "convolution", "convolution_backward", "dot")
FREE = (
    "view", "unsafe_view", "reshape", "t", "transpose", "expand", "slice", "select", "unsqueeze", "detach",
    "empty", "permute", "alias",
)  # fmt: skip


class MovedBytes(TorchDispatchMode):
    """Bytes that elementwise operations, reductions and copies read and write, by kind of operation."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.by_name: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.strip("_")
        if name in PRODUCTS or "attention" in name or name.startswith(FREE) or func.is_view:
            return result
        moved = 0
        for value in (*tree_leaves(args), *tree_leaves(result)):
            if isinstance(value, torch.Tensor):
                moved += value.numel() * value.element_size()
        self.total += moved
        self.by_name[name] = self.by_name.get(name, 0) + moved
        return result


class AnyAttention(torch.autograd.Function):
    """In the place of SDPA, which on this device is a sum of parts instead of one kernel."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ctx.shapes = (query, key, value)
        return torch.empty_like(query)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.shapes))


def any_attention(*arguments: Any, **_: Any) -> Any:
    return AnyAttention.apply(*arguments[:3])


def wide(**changes: Any) -> MobileVLMConfig:
    config = read_model_config(tiny.STUDENT)
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "vocab_size": 4000}
    return dataclasses.replace(config, **sizes, **changes)


def moved_by_the_layers(model: MobileVLM, dtype: torch.dtype, *, has_backward: bool) -> int:
    embeddings = torch.empty(2, 512, 256, dtype=dtype, device=META, requires_grad=has_backward)
    fused = patch.object(functional, "scaled_dot_product_attention", any_attention)
    with fused, MovedBytes() as moved:
        output = model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        if has_backward:
            output.backward(torch.empty_like(output))
    return moved.total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("has_backward", "trained"), [(False, False), (True, True), (True, False)], ids=str)
def test_elementwise_bytes_of_the_layers_are_those_of_transformers(
    dtype: torch.dtype, has_backward: bool, trained: bool
) -> None:
    with META:
        model = MobileVLM(wide()).to(dtype)
    model.language_model.requires_grad_(trained)
    moved = moved_by_the_layers(model, dtype, has_backward=has_backward)
    passes = plan.Passes(1, has_backward + trained)
    costs = plan._layers("its", mobilevlm_shapes(wide()), WORK, dtype.itemsize, passes, compiled=False)
    (elementwise,) = (cost for cost in costs if cost.name == "its elementwise")
    assert elementwise.bytes == pytest.approx(moved, rel=0.12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_elementwise_bytes_of_lora_are_those_of_peft(dtype: torch.dtype) -> None:
    with META:
        model = MobileVLM(wide()).to(dtype)
    model.language_model.requires_grad_(False)
    without = moved_by_the_layers(model, dtype, has_backward=True)
    with META:
        add_lora(model, LoraSection(rank=8), seed=0)
    model.to(dtype)  # peft gives its matrices the model's dtype, but not on this device
    moved = moved_by_the_layers(model, dtype, has_backward=True) - without
    predicted = plan.lora_bytes(mobilevlm_shapes(wide()), WORK, dtype.itemsize, 1)
    assert predicted == pytest.approx(moved, rel=0.12)


@pytest.mark.parametrize("told", ["nothing", "hidden states", "top_k"])
def test_bytes_of_the_heads_are_those_of_the_fused_losses(told: str) -> None:
    """Of a teacher that is not there, of one whose head is applied, and of its cache in top_k."""
    positions, vocabulary, cached = 1024, 4000, 64
    empty = partial(torch.empty, dtype=torch.bfloat16, device=META)
    hidden, weight = empty(positions, 256, requires_grad=True), empty(vocabulary, 256, requires_grad=True)
    targets = LogitTargets(labels_N=torch.empty(positions, dtype=torch.int64, device=META))
    if told == "hidden states":
        states, head = empty(positions, 512), empty(vocabulary, 512)
        targets = dataclasses.replace(targets, teacher_hidden_ND=states, teacher_weight_WD=head)
    if told == "top_k":
        top = TopTokens(empty(positions, cached + 1), empty(positions, cached).int())
        targets = dataclasses.replace(targets, teacher_top=top, divergence="forward_kl")
    with MovedBytes() as moved:
        fused_logit_losses(hidden, weight, targets=targets, scales=(1.0, 1.0)).loss.backward()
    student, teacher = model_sizes(wide()), None if told == "nothing" else model_sizes(wide())
    work = dataclasses.replace(WORK, samples=1, length=positions + WORK.vision_tokens)
    sizes = RunSizes(teacher, student, {})
    cost = plan._heads(sizes, work, Trained(), has_top_k=told == "top_k")
    assert cost.bytes == pytest.approx(moved.total, rel=0.05)


def test_bytes_of_the_attention_term_are_those_of_the_fused_loss() -> None:
    config = wide()
    rows = WORK.text_rows
    layout = BlockLayout(
        places=((0, 0, rows),),
        text_rows_IM=torch.empty(1, rows, dtype=torch.int64, device=META),
        vision_tokens=144,
    )
    query, key = (
        torch.empty(1, 4, 512, 64, dtype=torch.bfloat16, device=META, requires_grad=True) for _ in range(2)
    )
    weight = torch.empty(4, 4, dtype=torch.bfloat16, device=META, requires_grad=True)
    bias = torch.empty(4, dtype=torch.bfloat16, device=META, requires_grad=True)
    with MovedBytes() as moved:
        with torch.no_grad():
            block = text_vision_block(query, key, 0.1, layout).to(torch.bfloat16)
        loss = partial(fused_attention_loss, teacher_block_ITMV=block, scaling=0.1, layout=layout)
        loss(query, key, weight, bias).backward()
    shapes, work = mobilevlm_shapes(config), dataclasses.replace(WORK, samples=1)
    cost = plan._attention_term(shapes, shapes, work, work)
    assert cost.bytes == pytest.approx(moved.total, rel=0.15)


def published(**changes: Any) -> tuple[Config, RunSizes]:
    """The published 7B teacher and 1.7B student, bf16."""
    training = {"precision": "bf16", "gradient_checkpointing": True, "global_batch_size": 8, **changes}
    data = {"sources": [{"file": "x.json"}], "max_length": 2048}
    document = {"model": {"teacher": "t", "student": "s"}, "data": data, "training": training}
    models = [
        dataclasses.replace(
            read_model_config(tiny.STUDENT),
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            vocab_size=32000,
            mm_hidden_size=1024,
            tower_config=PUBLISHED_TOWER_CONFIG,
        )
        for width, mlp, layers, heads in ((4096, 11008, 32, 32), (2048, 5632, 24, 16))
    ]
    teacher, student = map(model_sizes, models)
    sizes = RunSizes(teacher, student, adapter_sizes(teacher.shapes, student.shapes))
    return Config.model_validate(document), sizes


@pytest.mark.parametrize(("compiled", "measured"), [(False, 0.518), (True, 0.403)])
def test_the_measured_step_of_an_h200_takes_a_third_longer(compiled: bool, measured: float) -> None:
    """docs/performance.md: 4 samples of 2048 tokens, the second half of their text supervised."""
    config, sizes = published(compile_layers=compiled, micro_batch_size=4)
    work, cluster = workload(config, Cluster(1, 2), 144), Cluster(1, 2)
    found = plan.roofline(config, sizes, work, run_compute(config, sizes, work, cluster), plan.CHIPS["h200"])
    assert measured / found.seconds == pytest.approx(1.33, abs=0.08)
    assert [cost.name for cost in found.costs[:2]] == [
        "teacher's matrix products",
        "student's matrix products",
    ]
    elementwise = sum(cost.seconds(found.chip) for cost in found.costs if "elementwise" in cost.name)
    assert (elementwise > 0.08) is not compiled


def test_operations_are_those_of_the_plan_but_for_attention_s_backward() -> None:
    config, sizes = published(micro_batch_size=4)
    work, cluster = workload(config, Cluster(1, 2), 144), Cluster(1, 2)
    compute = run_compute(config, sizes, work, cluster)
    flops = sum(cost.flops for cost in plan.step_costs(config, sizes, work, compute.micro_batches))
    assert compute.micro_batches == 1
    assert flops == pytest.approx(compute.flops, rel=0.03)


def test_fp32_has_a_peak_of_its_own() -> None:
    config, sizes = published(micro_batch_size=4, precision="fp32")
    work, cluster = workload(config, Cluster(1, 2), 144), Cluster(1, 2)
    found = plan.roofline(config, sizes, work, run_compute(config, sizes, work, cluster), plan.CHIPS["h100"])
    assert found.chip.peak == 67e12
    assert found.seconds > 3.0


def test_two_micro_batches_take_twice_as_long_as_one() -> None:
    config, sizes = published(micro_batch_size=4)
    work = workload(config, Cluster(1, 2), 144)
    once, twice = (plan.step_costs(config, sizes, work, times) for times in (1, 2))
    chip = plan.CHIPS["h100"]
    assert sum(c.seconds(chip) for c in twice) == pytest.approx(2 * sum(c.seconds(chip) for c in once))


def test_a_cost_is_the_slower_of_its_operations_and_its_bytes() -> None:
    chip = plan.Chip("x", peak=100.0, fp32=10.0, matmul=50.0, bandwidth=10.0)
    assert plan.Cost("a", flops=100.0, bytes=5.0).seconds(chip) == 2.0
    assert plan.Cost("a", flops=100.0, bytes=50.0).seconds(chip) == 5.0
    assert plan.Cost("a", flops=100.0, bytes=5.0, share=0.5).seconds(chip) == 4.0


def test_a_teacher_with_more_vision_tokens_has_longer_samples_of_the_same_text() -> None:
    config, sizes = published(micro_batch_size=4)
    assert sizes.teacher is not None
    shapes = dataclasses.replace(sizes.teacher.shapes, vision_tokens=576)
    more = dataclasses.replace(sizes, teacher=dataclasses.replace(sizes.teacher, shapes=shapes))
    work, cluster = workload(config, Cluster(1, 2), 144), Cluster(1, 2)
    theirs = work.with_images_of(576)
    assert (theirs.length - work.length, theirs.text_rows) == (432, work.text_rows)
    assert work.with_images_of(144) == work

    before, after = (run_compute(config, one, work, cluster) for one in (sizes, more))
    layers = layer_flops(sizes.teacher, theirs) - layer_flops(sizes.teacher, work)
    assert after.teacher_flops - before.teacher_flops == pytest.approx(layers * before.micro_batches)
    assert after.student_flops == before.student_flops
    costs = [
        {cost.name: cost.flops for cost in plan.step_costs(config, one, work, 1)} for one in (sizes, more)
    ]
    changed = {name for name in costs[0] if costs[0][name] != costs[1][name]}
    of_teacher = {name for name in changed if name.startswith("teacher's")}
    assert of_teacher
    assert changed == of_teacher | {"attention term"}
    # Its rows of the first layer are longer, each by as much as there are more vision tokens.
    longer = 2.0 * work.images * work.text_rows * 432 * shapes.query_width
    assert costs[1]["attention term"] - costs[0]["attention term"] == pytest.approx(longer)
    files = rendered(config, cluster)
    memory = [
        {part.name: part.bytes for part in run_memory(config, one, work, cluster, files).parts}
        for one in (sizes, more)
    ]
    assert memory[1]["teacher's forward"] > memory[0]["teacher's forward"]
    assert memory[1]["teacher's targets"] == memory[0]["teacher's targets"]
    assert memory[1]["images of a step"] == 2 * memory[0]["images of a step"]


def test_the_memory_of_a_teacher_on_other_grids_has_its_block_on_both() -> None:
    """Of a window of many images, and a teacher whose layers are too narrow to need more than the block."""
    config, sizes = published(micro_batch_size=4, precision="fp32", global_batch_size=128)
    assert sizes.teacher is not None
    vision = dataclasses.replace(sizes.teacher.shapes.vision, mlp=1, width=1)
    shapes = dataclasses.replace(
        sizes.teacher.shapes, vision_tokens=576, intermediate_size=1, hidden_size=64, vision=vision
    )
    sizes = dataclasses.replace(sizes, teacher=dataclasses.replace(sizes.teacher, shapes=shapes))
    cluster = Cluster(1, 2)
    work = workload(config, cluster, 144)
    theirs = work.with_images_of(576)
    parts = run_memory(config, sizes, work, cluster, rendered(config, cluster)).parts
    (forward,) = (part.bytes for part in parts if part.name == "teacher's forward")
    alone = activations.teacher_workspace(shapes, theirs, 4, 4 * shapes.hidden_size, shares_tower=True)
    # 24 x 24 tokens become 24 x 12, then 12 x 12. The scores of a chunk of rows are gone by then.
    blocks = 3 * activations.block_bytes(shapes, work)
    more = blocks - activations.block_workspace(shapes, theirs, 4)
    assert forward - alone == more > 0
