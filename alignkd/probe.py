"""Before a long training run: value, count and gradient norm of each loss term on a few samples."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from alignkd.config.schema import (
    DEFAULT_MAX_IMAGE_PIXELS,
    DataSection,
    DataSource,
    DistillationSection,
    ModelSection,
)
from alignkd.data.batch import Batch
from alignkd.data.collate import collate
from alignkd.data.encoder import SampleEncoder
from alignkd.data.examples import ExampleReader
from alignkd.data.index import build_index
from alignkd.engine.optimizer_step import term_weights
from alignkd.engine.student_step import StudentStep
from alignkd.errors import UserError
from alignkd.losses.total import TERMS, element_counts, means, term_scales, total
from alignkd.models.adapters import load_adapters, seeded_adapters
from alignkd.models.agreement import check_agreement, template_problems
from alignkd.models.building import BuildOptions
from alignkd.models.encoding import pair_encoder
from alignkd.models.families.mobilevlm import MobileVLM
from alignkd.models.loading import load_model
from alignkd.teacher.targets import TeacherModel, TeacherTargets

LONGEST = 2**20  # tokens of a sample
PROBE_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ProbeResult:
    terms: dict[str, float]
    counts: dict[str, int]
    gradient_norms: dict[str, float]

    def as_dict(self) -> dict[str, dict[str, float] | dict[str, int]]:
        return asdict(self)


def run_probe(
    teacher: Path,
    student: Path,
    data: Path,
    image_folder: Path | None,
    template: Literal["plain", "v1", "chat"],
    image_aspect_ratio: Literal["pad", "square"],
    adapters: Path | None,
    dtype: str,
    seed: int,
) -> ProbeResult:
    """Run all samples of ``data`` as one batch through both models. ``total`` has unit weights.

    Raises UserError for models that do not fit each other, bad samples, or adapters of the wrong shapes.
    """
    if dtype not in PROBE_DTYPES:
        raise UserError(f"--dtype {dtype}: valid are {', '.join(PROBE_DTYPES)}")
    distillation = DistillationSection()
    section = ModelSection(teacher=str(teacher), student=str(student))
    source = DataSource(
        file=str(data),
        image_folder=None if image_folder is None else str(image_folder),
        template=template,
        image_aspect_ratio=image_aspect_ratio,
    )
    problems = check_agreement(section, distillation.top_k)
    if problems := problems or template_problems(section, [source]):
        raise UserError("; ".join(problems))
    options = BuildOptions(PROBE_DTYPES[dtype])
    teacher_model = TeacherModel(load_model(teacher, options), distillation.top_k)
    student_model = load_model(student, options)
    encoder = pair_encoder(section, DEFAULT_MAX_IMAGE_PIXELS)
    longest = (
        student_model.config.max_position_embeddings if isinstance(student_model, MobileVLM) else LONGEST
    )
    batch = _one_batch(source, encoder, longest, distillation.top_k)
    configs = teacher_model.model.facts, student_model.facts
    adapter_modules = (
        seeded_adapters(*configs, seed) if adapters is None else load_adapters(adapters, *configs)
    )
    step = StudentStep(student_model, adapter_modules.to(options.dtype), distillation)
    return _measure(step, teacher_model, batch, distillation)


def _one_batch(source: DataSource, encoder: SampleEncoder, longest: int, top_k: int) -> Batch:
    data = DataSection(sources=[source], max_length=longest)
    index = build_index(data, encoder)
    if any(report.removed for report in index.reports):
        raise UserError(f"{index.summary()}; the probe needs every sample, so remove these")
    reader = ExampleReader(data, index, encoder)
    settings = encoder.collate_settings(top_k=top_k)
    return collate([reader(number) for number in range(len(index))], settings)


def _measure(
    step: StudentStep, teacher: TeacherModel, batch: Batch, distillation: DistillationSection
) -> ProbeResult:
    counts = element_counts(batch.counts, step.sizes())
    weights = term_weights(distillation)
    targets, head = teacher(batch), teacher.model.head.cut(teacher.model.head.weight)
    sums = step(batch, (0.0,) * len(TERMS), targets, head).sums.tolist()
    values = means(dict(zip(TERMS, sums, strict=True)), counts)
    norms = {}
    for name in (*TERMS, "total"):
        chosen = weights if name == "total" else {term: float(term == name) for term in TERMS}
        norms[name] = _gradient_norm(step, batch, term_scales(counts, chosen, 1.0), targets, head)
    vision = values["vision_all"] + distillation.vision_focus_weight * values["vision_focus"]
    shown = {**values, "vision": vision, "total": total(values, weights)}
    rename = {"divergence": distillation.divergence}
    return ProbeResult(
        terms={rename.get(name, name): value for name, value in shown.items()},
        counts={rename.get(name, name): value for name, value in counts.items()},
        gradient_norms={rename.get(name, name): value for name, value in norms.items()},
    )


def _gradient_norm(
    step: StudentStep,
    batch: Batch,
    scales: tuple[float, ...],
    targets: TeacherTargets,
    head: torch.Tensor,
) -> float:
    """L2 norm of the loss's gradient with respect to the student, without the adapters."""
    step.zero_grad(set_to_none=True)
    step(batch, scales, targets, head).loss.backward()
    gradients = [parameter.grad for parameter in step.student.parameters() if parameter.grad is not None]
    return float(nn.utils.get_total_norm(gradients))
