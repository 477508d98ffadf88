"""The step of ``benchmarks.step`` for transformers' families: the product's against a floor.

The floor is what no method can do without: transformers' own forward of the frozen teacher and of the
student, with SDPA, the student's backward, and cross-entropy and KL at the supervised positions by the
product's fused losses; none of the alignment terms. Both run both vision towers, on the same parameters and
batches. On a CPU, seconds are those that this process computed: other load changes them little.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from alignkd.data.batch import Batch
from alignkd.distributed.ranks import Ranks
from alignkd.engine.optimizer_step import StepInfo, run_optimizer_step, term_weights
from alignkd.engine.stopwatch import Stopwatch
from alignkd.engine.student_step import StudentStep
from alignkd.losses.fused_logits import fused_logit_losses
from alignkd.losses.logits import LogitTargets
from alignkd.losses.total import element_counts, term_scales
from alignkd.models.adapters import seeded_adapters
from alignkd.models.building import DTYPES
from benchmarks.batches import Shape
from benchmarks.families import BUILDERS, Model, random_models, random_window
from benchmarks.measure import Edge, Memory, seconds, step_memory
from benchmarks.methods import PlainEngine, ResidentTeacher
from benchmarks.setting import DISTILLATION, total_counts

HEAD = ["family", "L x samples", "method", "seconds", "spread", "x floor", "kept MiB", "x floor"]
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}  # relative, of the losses that both compute
LEAST_ROUNDS, MOST_ROUNDS = 3, 15


@dataclass(frozen=True)
class FamilySetting:
    name: str
    teacher: Model
    student: Model
    module: StudentStep  # student and adapters
    edge: Edge
    device: torch.device


def new_setting(name: str, teacher: Model, student: Model, device: torch.device) -> FamilySetting:
    teacher.ours.eval().requires_grad_(False)
    teacher.plain.eval()
    student.ours.train()
    student.plain.train()
    adapters = seeded_adapters(teacher.ours.facts, student.ours.facts, seed=0)
    adapters = adapters.to(device, student.ours.head.weight.dtype)
    return FamilySetting(
        name, teacher, student, StudentStep(student.ours, adapters, DISTILLATION), Edge(), device
    )


def ours(setting: FamilySetting, window: Sequence[Batch]) -> torch.Tensor:
    """The product's optimizer step. Sums of cross-entropy and divergence."""
    counts = total_counts(window)
    info = StepInfo(counts, element_counts(counts, setting.module.sizes()), usr1=False, term=False)
    sums = run_optimizer_step(
        PlainEngine(setting.module, setting.edge),
        ResidentTeacher(setting.teacher.ours, shares_tower=False),
        list(window),
        info,
        DISTILLATION,
        Ranks(rank=0, world_size=1, device=setting.device, cpu_group=None),
        Stopwatch(),
    )
    return sums.terms[:2]


def floor(setting: FamilySetting, window: Sequence[Batch]) -> torch.Tensor:
    counts = element_counts(total_counts(window), setting.module.sizes())
    scales = term_scales(counts, term_weights(DISTILLATION), 1.0)
    total = torch.zeros(2, device=setting.device)
    teacher_head_WD = setting.teacher.ours.head.weight.detach()
    for batch in window:
        with torch.no_grad():
            teacher_ND = _hidden(setting.teacher, batch)
        targets = LogitTargets(
            batch.logit_labels_N, teacher_hidden_ND=teacher_ND, teacher_weight_WD=teacher_head_WD
        )
        losses = partial(fused_logit_losses, targets=targets, scales=(scales[0], scales[1]))
        loss, sums = setting.student.ours.head(_hidden(setting.student, batch), losses)
        setting.edge.on_reached()
        loss.backward()
        total += sums
    return total


def _hidden(model: Model, batch: Batch) -> torch.Tensor:
    """At the logit positions, as a user of transformers would get them."""
    inputs: dict[str, Any] = {"pixel_values": batch.pixel_values.to(model.plain.dtype), **batch.image_inputs}
    marks = model.ours.family.marks_images
    if marks is not None:
        inputs[marks] = (batch.input_ids_BL == model.plain.config.image_token_id).long()
    output = model.plain.model(input_ids=batch.input_ids_BL, use_cache=False, **inputs)
    hidden: torch.Tensor = output.last_hidden_state.flatten(0, 1)[batch.logit_positions_N]
    return hidden


METHODS = {"floor": floor, "ours": ours}


@dataclass
class Measured:
    memory: Memory
    seconds: list[float]


def measure(
    setting: FamilySetting, shape: Shape, precision: str, budget: float, deadline: float
) -> dict[str, Measured]:
    """By method; in turns, until ``budget`` seconds are over or the clock reads ``deadline``."""
    window = random_window(setting.name, shape, setting.device)
    found: dict[str, Measured] = {}
    losses: list[torch.Tensor] = []
    for name, method in METHODS.items():
        step = partial(_step, setting, window, method, losses)
        found[name] = Measured(step_memory(step, setting.edge, setting.device), [])
    if not torch.allclose(losses[0], losses[1], rtol=TOLERANCE[precision]):
        raise SystemExit(f"{setting.name}: the floor has losses {losses[0]}, the product {losses[1]}")
    started = time.monotonic()
    for number in range(MOST_ROUNDS):
        for name in sorted(METHODS, reverse=number % 2 == 1):
            step = partial(_step, setting, window, METHODS[name], [])
            found[name].seconds.append(_seconds(step, setting.device))
        if time.monotonic() > deadline or (
            number + 1 >= LEAST_ROUNDS and time.monotonic() - started > budget
        ):
            break
    return found


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    if device.type != "cpu":
        return seconds(step, device)
    start = time.process_time()
    step()
    return time.process_time() - start


def _step(setting: FamilySetting, window: list[Batch], method: Any, losses: list[torch.Tensor]) -> None:
    losses.append(method(setting, window).detach())
    setting.module.zero_grad(set_to_none=True)


def rows_of(
    names: Sequence[str],
    shapes: Sequence[Shape],
    precision: str,
    device: torch.device,
    budget: float,
    deadline: float,
) -> list[list[str]]:
    """Rows of :data:`HEAD`. Shapes that are too short for an image and a text are left out."""
    rows = []
    for name in names:
        setting = new_setting(name, *random_models(name, DTYPES[precision], device), device)
        for shape in shapes:
            if min(shape.lengths) < BUILDERS[name].vision_tokens + 200 or time.monotonic() > deadline:
                continue
            found = measure(setting, shape, precision, budget, deadline)
            base = found["floor"]
            for method, result in found.items():
                ratio = statistics.median(a / b for a, b in zip(result.seconds, base.seconds, strict=True))
                rows.append(
                    [
                        name,
                        shape.name,
                        method,
                        f"{statistics.median(result.seconds):.3f}",
                        f"{min(result.seconds):.3f} to {max(result.seconds):.3f}",
                        f"{ratio:.2f}",
                        f"{result.memory.kept / 2**20:.0f}",
                        f"{result.memory.kept / base.memory.kept:.2f}",
                    ]
                )
                print(" | ".join(rows[-1]), flush=True)
    return rows
