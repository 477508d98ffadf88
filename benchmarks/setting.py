"""The models that all methods of ``benchmarks.step`` share, and what they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alignkd.config.schema import DistillationSection
from alignkd.data.batch import Batch, TermCounts
from alignkd.engine.student_step import StudentStep
from alignkd.losses.total import element_counts
from alignkd.models.adapters import seeded_adapters
from alignkd.models.families.mobilevlm import MobileVLM
from benchmarks.measure import Edge

DISTILLATION = DistillationSection.model_validate({})  # all terms, the paper's K and lambda
Losses = dict[str, float]
Sums = dict[str, torch.Tensor]  # terms over a window: 0-dimensional, detached, still on the device


@dataclass(frozen=True)
class Setting:
    """The models, and the moment that memory is read at."""

    teacher: MobileVLM
    student: MobileVLM
    module: StudentStep  # student and adapters
    edge: Edge
    device: torch.device

    def forget_gradients(self) -> None:
        self.module.zero_grad(set_to_none=True)

    def elements(self, window: Sequence[Batch]) -> dict[str, int]:
        """Divisors of the sums of an optimizer step."""
        return element_counts(total_counts(window), self.module.sizes())

    def means(self, sums: Sums, window: Sequence[Batch]) -> Losses:
        """The losses of a step. Waits for the device, which no method does by itself."""
        elements = self.elements(window)
        values = torch.stack(list(sums.values())).tolist()
        return {name: value / max(elements[name], 1) for name, value in zip(sums, values, strict=True)}


def new_setting(teacher: MobileVLM, student: MobileVLM, device: torch.device) -> Setting:
    adapters = seeded_adapters(teacher.config, student.config, seed=0)
    module = StudentStep(student, adapters.to(device, student.head.weight.dtype), DISTILLATION)
    return Setting(teacher.eval().requires_grad_(False), student.train(), module, Edge(), device)


def total_counts(window: Sequence[Batch]) -> TermCounts:
    return sum((batch.counts for batch in window), start=TermCounts())


def padding_share(window: Sequence[Batch]) -> float:
    """Of the positions that a language model computes."""
    counts = total_counts(window)
    return 1 - counts.tokens / counts.slots
