"""The gradient that each loss term sends into each part of the student.

Each term takes a forward and a backward pass of its own, because the fused logit losses multiply out the
gradient of their weighted sum. Gradients are returned, not accumulated: the run's own, and DeepSpeed's hooks
on them, are not touched.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from alignkd.data.batch import Batch
from alignkd.engine.student_step import StudentStep
from alignkd.losses.precision import at_least_fp32
from alignkd.losses.total import TERMS
from alignkd.models.families.interface import VisionLanguageModel
from alignkd.teacher.targets import TeacherTargets

_LAYER = re.compile(r"(?:language_model|text_model)\.(?:model\.)?layers\.(\d+)\.(.*)")
_QUERIES_AND_KEYS = re.compile(r"(?:q|k|qkv)_(?:proj|norm)\.")


def parts_of(student: VisionLanguageModel) -> dict[str, list[torch.nn.Parameter]]:
    """The trained parameters by part, in the model's order: ``projector``, ``layer N queries and keys``,
    ``layer N rest``, ``head`` (also where it is tied to the embeddings), and ``other`` (embeddings, final
    norm, a tower that is trained)."""
    parts: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            part = "head" if parameter is student.head.weight else _part(student, name)
            parts.setdefault(part, []).append(parameter)
    return parts


def term_gradient_norms(
    step: StudentStep,
    batch: Batch,
    scales: Sequence[float],
    targets: TeacherTargets | None,
    teacher_head_WD: torch.Tensor | None,
) -> torch.Tensor:
    """L2 norms, fp32 (or wider) [len(TERMS), parts], in the order of ``TERMS`` and of :func:`parts_of`.

    ``scales`` as for the step: with their weights, the norms are what the terms contribute to its gradient. A
    term whose scale is 0 is not run. Nothing waits for the device. Not for parameters sharded by ZeRO-3.
    """
    parts = list(parts_of(step.student).values())
    weight = step.student.head.weight
    norms = weight.new_zeros(len(TERMS), len(parts), dtype=at_least_fp32(weight.dtype))
    everything = [parameter for part in parts for parameter in part]
    for term, scale in enumerate(scales):
        if scale == 0.0 or (term > 0 and targets is None):
            continue
        alone = tuple(scale if number == term else 0.0 for number in range(len(TERMS)))
        loss = step(batch, alone, targets, teacher_head_WD).loss
        found = iter(torch.autograd.grad(loss, everything, allow_unused=True))
        for number, part in enumerate(parts):
            gradients = [gradient for _ in part if (gradient := next(found)) is not None]
            if gradients:
                norms[term, number] = torch.nn.utils.get_total_norm(gradients)
    return norms


def _part(student: VisionLanguageModel, name: str) -> str:
    if student.is_projector(name):
        return "projector"
    layer = _LAYER.search(name)
    if layer is None:
        return "other"
    kind = "queries and keys" if _QUERIES_AND_KEYS.search(layer[2]) else "rest"
    return f"layer {layer[1]} {kind}"
