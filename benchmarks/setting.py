"""The models that all methods of ``benchmarks.step`` share, and what they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from alignkd.config.schema import DistillationSection
from alignkd.config.teacher_section import TeacherSection
from alignkd.data.batch import Batch, TermCounts
from alignkd.engine.student_step import StudentStep
from alignkd.losses.total import element_counts
from alignkd.models.adapters import seeded_adapters
from alignkd.models.families.mobilevlm import MobileVLM
from alignkd.models.families.mobilevlm_parts import MobileVLMParts
from alignkd.teacher.cache_forms import FORMS
from alignkd.teacher.cache_top_k import TeacherHead
from alignkd.teacher.targets import logit_hidden
from benchmarks.measure import Edge

DISTILLATION = DistillationSection.model_validate({})  # all terms, the paper's K and lambda
FORWARD_KL = DISTILLATION.model_copy(update={"divergence": "forward_kl"})
CACHE_TOP_K = TeacherSection().cache_top_k
CacheForm = Literal["exact", "top_k"]  # of a cache, ``teacher.cache_form``
Losses = dict[str, float]
Sums = dict[str, torch.Tensor]  # terms over a window: 0-dimensional, detached, still on the device


@dataclass(frozen=True)
class Setting:
    """The models, and the moment that memory is read at."""

    teacher: MobileVLM
    parts: MobileVLMParts  # of the teacher, as a run with its cache holds them
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
    teacher = teacher.eval().requires_grad_(False)
    return Setting(teacher, _parts_of(teacher, device), student.train(), module, Edge(), device)


def _parts_of(teacher: MobileVLM, device: torch.device) -> MobileVLMParts:
    """They share the teacher's weights."""
    with torch.device("meta"):
        parts = MobileVLMParts(teacher.config)
    held = {name for name, _ in parts.named_parameters()}
    weights = {name: value for name, value in teacher.state_dict().items() if name in held}
    parts.load_state_dict(weights, strict=False, assign=True)
    parts.restore_buffers(device)
    return parts.eval().requires_grad_(False)


@torch.no_grad()
def as_from_cache(teacher: MobileVLM, window: Sequence[Batch], form: CacheForm) -> list[Batch]:
    """The window as a loader with a cache of the teacher gives it."""
    head = TeacherHead(teacher.head.weight, CACHE_TOP_K, DISTILLATION.temperature)
    encode, fill = FORMS[form].encode, FORMS[form].fill
    dtype = head.weight_WD.dtype
    return [fill(batch, encode(logit_hidden(batch, teacher(batch)), head), dtype) for batch in window]


def total_counts(window: Sequence[Batch]) -> TermCounts:
    return sum((batch.counts for batch in window), start=TermCounts())


def padding_share(window: Sequence[Batch]) -> float:
    """Of the positions that a language model computes."""
    counts = total_counts(window)
    return 1 - counts.tokens / counts.slots
