"""How long the parts of an optimizer step take at the least, on a chip: the larger of the time for their
operations and the time for the bytes that they move (the roofline model of Williams et al., 2009).

Nothing else is counted: no launches, no update of the optimizer, no waiting for data or other ranks. Bytes
are those of eager transformers (5.23) and of our losses; a test counts them, operation by operation.
Constants in capitals are passes over a tensor, each a read or a write of all of it.

Shapes: T tokens, D width, F width of the MLP, Q width of all queries, K width of all keys; ``size`` is the
bytes per element.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from alignkd.config import Config
from launcher.plan.activations import (
    FP32,
    POSITIONS_PER_CHUNK,
    ROWS_PER_CHUNK,
    checkpointed_layers,
)
from launcher.plan.compute import (
    Compute,
    head_flops,
    head_passes,
    projector_flops,
    projector_passes,
    tower_flops,
)
from launcher.plan.shapes import ModelShapes
from launcher.plan.sharding import shares_tower, student_size, teacher_size
from launcher.plan.sizes import RunSizes
from launcher.plan.tensors import ModelSizes
from launcher.plan.trained import Trained, lora_sizes, trained_parts
from launcher.plan.workload import Workload

# Over activations of width D, F or D + K in a layer's forward. A norm works in fp32, which counts twice in 16
# bits.
NORM_16, NORM_32 = 18, 7
ROTARY, ACTIVATION, RESIDUAL, TRANSPOSE = 10, 5, 3, 2
COMPILED_NORM, COMPILED_ROTARY, COMPILED_ACTIVATION = 2, 2, 3
BACKWARD = 2  # a backward moves about twice what its forward does
# Over what LoRA's matrices add to, and its gradient; inputs and outputs of the layers are as wide together.
LORA_PASSES, LORA_BACKWARD_PASSES = 5, 5
# Of fp32 matrices [positions, vocabulary] in the fused head, with a teacher and without; of its gradient.
LOGIT_PASSES, LABEL_PASSES, GRADIENT_PASSES = 26, 9, 3
TOP_K_PASSES = 34  # instead of LOGIT_PASSES, to complete what a cache in top_k has of the teacher
# Of fp32 rows of attention in the first layer's term: scores, mask, softmax, cut; and again in the backward.
BLOCK_PASSES, BLOCK_BACKWARD_PASSES = 5, 13
ATTENTION_BACKWARD = 2.5  # operations, in units of the forward's


MATMUL_SHARE, COPY_SHARE = 0.80, 0.875  # of the data sheet, measured on an H200 (docs/performance.md)
ATTENTION_SHARE = 0.5  # of matmul that fused attention reaches; an assumption


@dataclass(frozen=True)
class Chip:
    """``peak`` is the data sheet's, dense, in bf16 or fp16; ``matmul`` and ``bandwidth`` are what programs
    reach. ``fp32``: the peak of fp32, without TF32, which ranks turn off."""

    name: str
    peak: float  # FLOP/s
    fp32: float  # FLOP/s
    matmul: float  # FLOP/s
    bandwidth: float  # bytes/s


CHIPS = {
    name: Chip(name, peak, fp32, MATMUL_SHARE * peak, COPY_SHARE * bandwidth)
    for name, peak, fp32, bandwidth in (
        ("a100", 312e12, 19.5e12, 2.04e12),
        ("h100", 989e12, 67e12, 3.35e12),
        ("h200", 989e12, 67e12, 4.8e12),
        ("b200", 2250e12, 80e12, 8.0e12),
    )
}


@dataclass(frozen=True)
class Cost:
    """A part of the step on one rank. ``flops`` and ``bytes`` per optimizer step."""

    name: str
    flops: float
    bytes: float
    share: float = 1.0  # of the chip's matmul speed

    def seconds(self, chip: Chip) -> float:
        return max(self.flops / (chip.matmul * self.share), self.bytes / chip.bandwidth)


def step_costs(config: Config, sizes: RunSizes, work: Workload, times: float) -> list[Cost]:
    """All parts of an optimizer step. ``times``: micro-batches of ``work`` in it."""
    student, training, trained = sizes.student, config.training, trained_parts(config)
    size, passes = student_size(config), 4 if training.gradient_checkpointing else 3
    again = checkpointed_layers(training, student.shapes) / student.shapes.num_hidden_layers
    compiled = training.compile_layers
    layers = Passes(1 + again, 2 if trained.language_model else 1)
    costs = list(_layers("student's", student.shapes, work, size, layers, compiled=compiled))
    if trained.lora_rank:
        costs.append(_lora(student.shapes, work, size, trained.lora_rank, 1 + again))
    towers = 0 if shares_tower(config, sizes) else 1
    towers = passes if training.train_vision_tower else towers
    costs += _vision("student's", student, work, size, towers, projector_passes(trained))
    if sizes.teacher is not None:
        model, bytes_each = sizes.teacher, teacher_size(config)
        theirs = work.with_images_of(model.shapes.vision_tokens)
        costs += _layers("teacher's", model.shapes, theirs, bytes_each, Passes(1, 0), compiled=compiled)
        costs += _vision("teacher's", model, theirs, bytes_each, 1, 1)
        costs.append(_attention_term(model.shapes, student.shapes, theirs, work))
    costs.append(_heads(sizes, work, trained, has_top_k=config.teacher.caches_top_k))
    return [Cost(cost.name, cost.flops * times, cost.bytes * times, cost.share) for cost in costs]


@dataclass(frozen=True)
class Roofline:
    """Of one rank and optimizer step, without anything between ranks."""

    chip: Chip
    costs: list[Cost]  # the slowest first
    flops: float

    @property
    def seconds(self) -> float:
        return sum(cost.seconds(self.chip) for cost in self.costs)

    @property
    def peak_share(self) -> float:
        """Of the chip's peak, recomputation included."""
        return self.flops / (self.seconds * self.chip.peak)


def roofline(config: Config, sizes: RunSizes, work: Workload, compute: Compute, chip: Chip) -> Roofline:
    if config.training.precision == "fp32":
        chip = replace(chip, peak=chip.fp32, matmul=MATMUL_SHARE * chip.fp32)
    costs = step_costs(config, sizes, work, compute.micro_batches)
    costs.sort(key=lambda cost: -cost.seconds(chip))
    return Roofline(chip, costs, compute.flops)


@dataclass(frozen=True)
class Passes:
    """Of decoder layers. ``backward``: 0 of a frozen model that needs none, 1 with gradients of activations
    only, 2 with those of the weights too; in units of a forward's matrix products."""

    forward: float  # up to 2 with recomputation
    backward: int


def _layers(
    whose: str, shapes: ModelShapes, work: Workload, size: int, passes: Passes, *, compiled: bool
) -> Iterator[Cost]:
    D, F, T = shapes.hidden_size, shapes.intermediate_size, work.tokens
    Q, K = shapes.query_width, shapes.key_width
    layers = shapes.num_hidden_layers
    weights = 2 * D * Q + 2 * D * K + 3 * D * F
    moved = weights + T * (4 * D + 2 * Q + 2 * K + 3 * F)
    products = layers * (passes.forward + passes.backward)
    yield Cost(f"{whose} matrix products", 2.0 * T * weights * products, moved * size * products)
    forward = 2.0 * T * work.length * Q * layers  # scores and values; causal attention counts half
    backward = ATTENTION_BACKWARD if passes.backward else 0.0
    read = layers * (passes.forward + (2 if passes.backward else 0))
    yield Cost(
        f"{whose} attention",
        forward * (passes.forward + backward),
        T * (2 * Q + 2 * K) * size * read,
        ATTENTION_SHARE,
    )
    norm = COMPILED_NORM if compiled else NORM_16 if size == 2 else NORM_32
    rotary = COMPILED_ROTARY if compiled else ROTARY
    activation = COMPILED_ACTIVATION if compiled else ACTIVATION
    transpose = 0 if compiled else TRANSPOSE
    elements = T * (2 * D * (norm + RESIDUAL) + (Q + K) * rotary + F * activation + Q * transpose)
    times = passes.forward + (BACKWARD if passes.backward else 0)
    yield Cost(f"{whose} elementwise", 0.0, float(elements * size * layers * times))


def _lora(shapes: ModelShapes, work: Workload, size: int, rank: int, forwards: float) -> Cost:
    """peft's matrices beside those of the layers: their products, and sums with what the layers return."""
    matrices = sum(lora_sizes(shapes, rank).values())
    products = work.tokens * (matrices // rank) * (forwards + 2) * size  # inputs and outputs
    moved = products + lora_bytes(shapes, work, size, forwards)
    return Cost("student's LoRA", 2.0 * work.tokens * matrices * (forwards + 2), moved)


def lora_bytes(shapes: ModelShapes, work: Workload, size: int, forwards: float) -> float:
    """Elementwise: outputs are scaled and added, gradients of them and of the inputs too."""
    widths = sum(lora_sizes(shapes, 1).values()) // 2  # of all inputs, and of all outputs
    return float(work.tokens * widths * size * (LORA_PASSES * forwards + LORA_BACKWARD_PASSES))


def _vision(
    whose: str, model: ModelSizes, work: Workload, size: int, tower_passes: int, projector_passes: int
) -> Iterator[Cost]:
    tower = model.shapes.vision
    positions = work.images * (tower.patches + 1)
    moved = positions * (12 * tower.width + 3 * tower.mlp) * size * tower.layers
    yield Cost(f"{whose} tower", tower_flops(model, work) * tower_passes, float(moved * tower_passes))
    features = work.images * tower.projected * (tower.width + 6 * model.shapes.hidden_size) * size
    flops = projector_flops(model, work) * projector_passes
    yield Cost(f"{whose} projector", flops, float(features * projector_passes))


def _heads(sizes: RunSizes, work: Workload, trained: Trained, *, has_top_k: bool) -> Cost:
    """Both heads and their losses, in chunks; the student's gradient is computed in the same pass. With
    ``has_top_k`` a cache has what the teacher's head returned, and only the student's is applied."""
    student, teacher = sizes.student, sizes.teacher
    flops = head_passes(trained) * head_flops(student, work)
    if teacher is None:
        passes = LABEL_PASSES
    elif has_top_k:
        passes = TOP_K_PASSES
    else:
        passes = LOGIT_PASSES
        flops += head_flops(teacher, work)
    positions, vocabulary = work.supervised, student.shapes.vocab_size
    chunks = -(-positions // POSITIONS_PER_CHUNK)
    gradient = chunks * GRADIENT_PASSES * student.head * FP32 if trained.language_model else 0
    return Cost("heads and logit losses", flops, float(passes * positions * vocabulary * FP32 + gradient))


def _attention_term(teacher: ModelShapes, student: ModelShapes, theirs: Workload, work: Workload) -> Cost:
    """Equation 1: rows of attention of the first layer, of the teacher once, of the student twice."""
    seen_by_teacher, seen = (_columns_of_rows(one) * one.images for one in (theirs, work))
    moved = seen_by_teacher * teacher.num_attention_heads * BLOCK_PASSES
    moved += seen * student.num_attention_heads * (BLOCK_PASSES + BLOCK_BACKWARD_PASSES)
    flops = 2.0 * (seen_by_teacher * teacher.query_width + seen * 4 * student.query_width)
    return Cost("attention term", flops, float(moved * FP32))


def _columns_of_rows(work: Workload) -> int:
    """Columns that the text rows of a sample see, row by row. A chunk's rows see those up to its end."""
    rows = work.text_rows
    return sum(
        min(ROWS_PER_CHUNK, rows - first) * (work.length - rows + min(first + ROWS_PER_CHUNK, rows))
        for first in range(0, rows, ROWS_PER_CHUNK)
    )
