"""How long the plan's roofline says that a step of the benchmark takes, on this chip."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from alignkd.config import Config
from alignkd.models.families.mobilevlm import MobileVLM
from benchmarks.batches import BEFORE_IMAGE, VISION_TOKENS, Shape
from launcher.plan.roofline import CHIPS, Chip, step_costs
from launcher.plan.sizes import RunSizes, adapter_sizes, model_sizes
from launcher.plan.workload import Workload

MATRIX, COPIED = 1024, 2**26  # rows and columns; bytes: more than a processor's cache
ROUNDS = 5
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class BatchWork(Workload):
    """Samples as the benchmark makes them: text before the image, half of the text after it supervised."""

    @property
    def text_rows(self) -> int:
        return self.length - self.vision_tokens - BEFORE_IMAGE

    @property
    def supervised(self) -> int:
        return self.samples * (self.text_rows // 2)


def chip_of(device: torch.device, dtype: torch.dtype) -> Chip:
    """By the data sheet where the plan knows the chip, in 16 bits; otherwise measured here, for a second."""
    if device.type == "cuda" and dtype != torch.float32:
        words = torch.cuda.get_device_name(device).lower().replace("-", " ").split()
        known = [chip for name, chip in CHIPS.items() if name in words]
        if known:
            return known[0]
    return measured_chip(device, dtype)


def measured_chip(device: torch.device, dtype: torch.dtype) -> Chip:
    left, right = (torch.randn(MATRIX, MATRIX, device=device).to(dtype) for _ in range(2))
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    rate = 2 * MATRIX**3 / _seconds(lambda: left @ right, device)
    return Chip("measured", rate, rate, rate, 2 * COPIED / _seconds(lambda: target.copy_(source), device))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of the fastest call."""
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken)


def predicted_seconds(
    teacher: MobileVLM, student: MobileVLM, shape: Shape, chip: Chip, checkpointing: bool
) -> float:
    """Of the product's packed step."""
    training = {
        "precision": NAMES[student.head.weight.dtype],
        "gradient_checkpointing": checkpointing,
    }
    config = Config.model_validate(
        {
            "model": {"teacher": "random", "student": "random"},
            "data": {"sources": [{"file": "random"}]},
            "training": training,
        }
    )
    both = model_sizes(teacher.config), model_sizes(student.config)
    sizes = RunSizes(*both, adapter_sizes(both[0].shapes, both[1].shapes))
    works = [
        BatchWork(samples, length, VISION_TOKENS, accumulation=1, window=1)
        for length, samples in Counter(shape.lengths).items()
    ]
    return sum(cost.seconds(chip) for work in works for cost in step_costs(config, sizes, work, 1.0))


def describe(chip: Chip) -> str:
    source = (
        "measured here before the steps"
        if chip.name == "measured"
        else "from the data sheet, as an H200 reached it"
    )
    return (
        f"Predicted by the plan's roofline from {chip.matmul / 1e12:.3g} TFLOP/s in a matrix product and "
        f"{chip.bandwidth / 1e9:.3g} GB/s in a copy, {source}."
    )
