"""Packed rows and joined micro-batches against padded ones: terms, gradients, allocations."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alignkd.config.schema import DistillationSection
from alignkd.data.batch import Batch
from alignkd.data.collate import Example
from alignkd.data.join import join
from alignkd.engine.student_step import StepOutput, StudentStep
from alignkd.losses import attention as attention_losses
from alignkd.losses.total import TERMS
from alignkd.models import attention
from alignkd.models.adapters import seeded_adapters
from alignkd.models.configuration import read_model_config
from alignkd.models.families.mobilevlm import MobileVLM
from alignkd.teacher.lookahead import split_targets
from alignkd.teacher.targets import TeacherModel, TeacherTargets
from tests import tiny

SCALES = tuple(0.01 * (number + 1) for number in range(len(TERMS)))


def two_images() -> Example:
    """Ends in an image, which therefore has no text row."""
    first, second = tiny.example("v1"), tiny.example("plain")
    return Example(first.ids + second.ids[:2], first.labels + second.labels[:2], first.images + second.images)


def examples(*names: str) -> list[Example]:
    return [two_images() if name == "two" else tiny.example(name) for name in names]


def lengths_of(*names: str) -> list[int]:
    """Embedding tokens of each sample; a batch without samples has one masked token."""
    return [len(one.ids) + 143 * len(one.images) for one in examples(*names)] or [1]


def batch_of(*names: str, packing: bool) -> Batch:
    return tiny.collate(examples(*names), tiny.CollateSettings(144, (3, 336, 336), packing=packing))


def random_model(which: Any, key_heads: int) -> MobileVLM:
    """The fixture's shape with fewer key heads (grouped-query attention) and random weights."""
    torch.manual_seed(0)
    model = MobileVLM(replace(read_model_config(which), num_key_value_heads=key_heads))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.12)
    return model


@pytest.fixture(scope="module")
def teacher() -> TeacherModel:
    return TeacherModel(random_model(tiny.TEACHER, 2), top_k=16)


@pytest.fixture(scope="module")
def step() -> StudentStep:
    model = random_model(tiny.STUDENT, 2)
    return StudentStep(
        model, seeded_adapters(read_model_config(tiny.TEACHER), model.config, 0), DistillationSection()
    )


def terms_and_gradients(
    step: StudentStep, teacher: TeacherModel, batch: Batch, targets: TeacherTargets
) -> dict[str, torch.Tensor]:
    step.zero_grad(set_to_none=True)
    output: StepOutput = step(batch, SCALES, targets, teacher.model.head.weight)
    output.loss.backward()
    gradients = {name: p.grad for name, p in step.named_parameters() if p.grad is not None}
    return {"terms": output.sums, **gradients}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            ours[name], expected, rtol=1e-5, atol=1e-5 * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "names",
    [("v1", "text", "two", "two", "rounds"), ("text", "text", "rounds"), ("text",), ()],
    ids="+".join,
)
def test_packed_equals_padded(
    step: StudentStep, teacher: TeacherModel, names: tuple[str, ...], checkpointing: bool
) -> None:
    """Several images, text only, equal and other lengths, no sample at all; grouped-query attention."""
    step = copy.deepcopy(step).train()
    if checkpointing:
        step.student.enable_gradient_checkpointing()
    results = []
    for packing in (False, True):
        batch = batch_of(*names, packing=packing)
        assert batch.segments == (tuple(lengths_of(*names)) if packing else ())
        results.append(terms_and_gradients(step, teacher, batch, teacher(batch)))
    assert bool(results[0]["terms"].all()) == ("rounds" in names)
    same(results[1], results[0])


def masked_attention(
    query_LHE: torch.Tensor,
    key_LHE: torch.Tensor,
    value_LHE: torch.Tensor,
    bounds_q: torch.Tensor,
    bounds_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """What torch documents of ``varlen_attn``, as a mask over all columns."""
    assert window_size == (-1, 0), "every earlier key, no later one"
    assert bounds_q.dtype == torch.int32
    assert torch.equal(bounds_q, bounds_k)
    assert longest_q == longest_k >= int(bounds_q.diff().max())
    assert query_LHE.shape == key_LHE.shape == value_LHE.shape, "torch 2.11 repeats no heads"
    columns = torch.arange(len(query_LHE))
    sample = torch.bucketize(columns, bounds_q, right=True)
    visible = (sample[:, None] == sample) & (columns[:, None] >= columns)
    heads = (x.transpose(0, 1)[None] for x in (query_LHE, key_LHE, value_LHE))
    output = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=visible, scale=scale)
    return output[0].transpose(0, 1)


def test_the_variable_length_kernel_is_asked_for_what_the_loop_computes(
    step: StudentStep, teacher: TeacherModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several joined micro-batches, too. The kernel itself exists on GPUs only."""
    names = ("v1", "text", "two", "two", "rounds")
    window = [batch_of(*names, packing=True), batch_of("text", packing=True), batch_of("plain", packing=True)]
    by_loop = [
        terms_and_gradients(step, teacher, batch, targets)
        for batch, targets in zip(window, split_targets(teacher(join(window)), window), strict=True)
    ]
    calls = []

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(arguments)
        return masked_attention(*arguments, **options)

    monkeypatch.setattr(attention, "has_varlen_kernel", lambda *_: True)
    monkeypatch.setattr(attention, "varlen_attn", watched)
    by_kernel = [
        terms_and_gradients(step, teacher, batch, targets)
        for batch, targets in zip(window, split_targets(teacher(join(window)), window), strict=True)
    ]
    layers = [len(model.language_model.layers) for model in (teacher.model, step.student)]
    assert len(calls) == layers[0] + len(window) * layers[1], "one teacher forward serves the window"
    for kernel, loop in zip(by_kernel, by_loop, strict=True):
        same(kernel, loop)


@pytest.mark.parametrize("packing", [False, True])
def test_targets_looked_ahead_are_those_of_each_micro_batch(teacher: TeacherModel, packing: bool) -> None:
    window = [
        batch_of(*names, packing=packing)
        for names in (("v1", "text"), ("text",), (), ("two", "rounds", "plain"))
    ]
    teacher.shares_tower = True
    ahead = split_targets(teacher(join(window)), window)
    alone = [teacher(batch) for batch in window]
    teacher.shares_tower = False
    for ours, theirs, batch in zip(ahead, alone, window, strict=True):
        for name, expected in theirs._asdict().items():
            got = getattr(ours, name)
            if name == "focus_indices_IK":
                has_rows = torch.tensor([place.rows > 0 for place in batch.image_places], dtype=torch.bool)
                assert torch.equal(got.sort()[0][has_rows], expected.sort()[0][has_rows])
            elif name != "patches_IPC" or batch.image_count:
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=name)
            else:
                assert got.shape == expected.shape, "a batch without an image gets one all the same"


def test_a_joined_padded_batch_is_the_collated_one() -> None:
    names = (("v1", "text"), ("two",), ("rounds", "plain"))
    for packing in (False, True):
        joined = join([batch_of(*part, packing=packing) for part in names])
        whole = batch_of(*(name for part in names for name in part), packing=packing)
        for name, expected in vars(whole).items():
            if name == "counts":  # shorter micro-batches had less padding
                expected, got = replace(expected, slots=0), replace(joined.counts, slots=0)
                assert got == expected
            elif isinstance(expected, torch.Tensor):
                assert torch.equal(getattr(joined, name), expected), name
            else:
                assert getattr(joined, name) == expected, name


def test_a_shared_tower_changes_neither_terms_nor_gradients(
    step: StudentStep, teacher: TeacherModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher.model.vision_tower.load_state_dict(step.student.vision_tower.state_dict())
    for names in (("v1", "two"), ("text",)):
        batch = batch_of(*names, packing=True)
        own = terms_and_gradients(step, teacher, batch, teacher(batch))
        teacher.shares_tower = True
        targets = teacher(batch)
        teacher.shares_tower = False
        with monkeypatch.context() as patch:
            patch.setattr(step.student, "patches", None)  # its own tower cannot run
            shared = terms_and_gradients(step, teacher, batch, targets)
        same(shared, own)


class Watch(TorchDispatchMode):
    """Shapes of everything that is allocated, and whether the host asked the device for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.asked: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.__name__.split(".")[0] in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"):
            self.asked.add(function.__name__)
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.shapes.add(tuple(value.shape))
        return result

    def maps(self, lengths: set[int]) -> list[tuple[int, ...]]:
        """Shapes with two dimensions as long as a sample or a row, of any dtype."""
        return [shape for shape in self.shapes if sum(size in lengths for size in shape) > 1]


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_makes_no_map_of_all_columns_and_asks_the_device_nothing(
    step: StudentStep, teacher: TeacherModel, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    monkeypatch.setattr(attention_losses, "ROWS_PER_CHUNK", 16)
    names = ("v1", "text", "two", "rounds")
    batch, sizes = batch_of(*names, packing=packing), lengths_of(*names)
    lengths = {*sizes, batch.input_ids_BL.shape[1]}
    assert min(lengths) > 16
    with Watch() as watch:
        targets = teacher(join([batch, batch]))
        terms_and_gradients(step, teacher, batch, split_targets(targets, [batch, batch])[0])
    assert len(watch.shapes) > 50
    assert watch.maps({*lengths, 2 * sum(sizes)}) == []
    assert watch.asked == set()


@torch.no_grad()
def test_the_watch_sees_the_maps_of_dense_attention(step: StudentStep) -> None:
    batch = batch_of("v1", "text", packing=False)
    length = batch.input_ids_BL.shape[1]
    with Watch() as watch:
        query = torch.randn(2, 4, length, 8)
        (query @ query.transpose(2, 3)).tril().argmax().item()
    assert (2, 4, length, length) in watch.maps({length})
    assert watch.asked == {"_local_scalar_dense.default"}


def test_no_mask_is_built_for_packed_rows(step: StudentStep, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by transformers either, which would look for positions that restart."""
    masks: list[Any] = []
    real = attention.sdpa_attention_forward

    def spy(module: Any, query: Any, key: Any, value: Any, mask: Any, **others: Any) -> Any:
        masks.append(mask)
        return real(module, query, key, value, mask, **others)

    monkeypatch.setattr(attention, "sdpa_attention_forward", spy)
    step.student(batch_of("v1", "text", packing=True))
    assert masks == [None] * 2 * step.student.config.num_hidden_layers


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_keeps_no_logits_and_no_block(step: StudentStep, teacher: TeacherModel, packing: bool) -> None:
    """Of all that autograd keeps for the student's backward, nothing has the vocabulary's or the vision
    tokens' length but the weights, the teacher's targets themselves and the gradient of the head's weight."""
    batch = batch_of("v1", "two", "rounds", packing=packing)
    targets, head = teacher(batch), teacher.model.head.weight
    known = {tensor.untyped_storage().data_ptr() for tensor in (*step.parameters(), *targets[:4], head)}
    kept: list[tuple[int, ...]] = []

    def pack(value: torch.Tensor) -> torch.Tensor:
        if value.untyped_storage().data_ptr() not in known:
            kept.append(tuple(value.shape))
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        step(batch, SCALES, targets, head)
    config = step.student.config
    assert len(kept) > 50
    assert [shape for shape in kept if config.vocab_size in shape] == [step.student.head.weight.shape]
    assert [shape for shape in kept if len(shape) > 2 and shape[-1] == config.vision_tokens] == []
