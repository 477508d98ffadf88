"""What each loss term weighs on a few samples: its value, its count, and its gradient, also by part of the
student. Before a long run, or in the middle of one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from alignkd.checkpoint.export import saved_student
from alignkd.config import load_run_config
from alignkd.config.schema import (
    DEFAULT_MAX_IMAGE_PIXELS,
    Config,
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
from alignkd.data.index_cache import cached_index
from alignkd.data.loader import build_sampler
from alignkd.data.sampler import GlobalBatchSampler
from alignkd.engine.balance import weights_in_use
from alignkd.engine.build import choose_trained_parts
from alignkd.engine.optimizer_step import term_weights
from alignkd.engine.student_step import StudentStep
from alignkd.engine.term_gradients import parts_of, term_gradient_norms
from alignkd.errors import UserError
from alignkd.losses.total import TERMS, element_counts, means, term_scales, total
from alignkd.models.adapters import load_adapters, seeded_adapters
from alignkd.models.agreement import check_agreement, template_problems
from alignkd.models.building import DTYPES, BuildOptions
from alignkd.models.encoding import pair_encoder, student_encoder
from alignkd.models.families.mobilevlm import MobileVLM
from alignkd.models.loading import load_model, load_student
from alignkd.run_folder.checkpoints import committed_steps, read_manifest, step_folder
from alignkd.run_folder.paths import RunPaths
from alignkd.teacher.targets import TeacherModel, TeacherTargets

LONGEST = 2**20  # tokens of a sample
PROBE_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ProbeResult:
    terms: dict[str, float]
    counts: dict[str, int]
    weights: dict[str, float]  # in the total: the configured ones, or those that distillation.balance has set
    gradient_norms: dict[str, float]  # of each term alone, without its weight, and of the weighted total
    parts: dict[str, dict[str, float]]  # term -> part of the student -> norm of the term's weighted gradient

    def as_dict(self) -> dict[str, Any]:
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
    return _measure(step, teacher_model, batch, distillation, term_weights(distillation))


def _one_batch(source: DataSource, encoder: SampleEncoder, longest: int, top_k: int) -> Batch:
    data = DataSection(sources=[source], max_length=longest)
    index = build_index(data, encoder)
    if any(report.removed for report in index.reports):
        raise UserError(f"{index.summary()}; the probe needs every sample, so remove these")
    reader = ExampleReader(data, index, encoder)
    settings = encoder.collate_settings(top_k=top_k)
    return collate([reader(number) for number in range(len(index))], settings)


def run_probe_of_run(run: Path, samples: int) -> ProbeResult:
    """Probe a run with its own configuration: the first ``samples`` samples of its data order (an epoch
    at most), as one batch in its precision on the CPU; student and adapters of its newest checkpoint, or
    those that it starts from.

    Raises UserError for a folder that is no run, a run without a teacher, and a bad sample.
    """
    paths = RunPaths(run)
    if not paths.config.is_file():
        raise UserError(f"{run}: not a run folder (no config.yaml)")
    config = load_run_config(paths.config)
    if not config.distillation.enabled or config.model.teacher is None:
        raise UserError(f"{run}: trains without a teacher, so its only term is the cross-entropy")
    batch = _first_samples(config, paths.index, samples)
    options = BuildOptions(DTYPES[config.training.precision])
    teacher = TeacherModel(load_model(config.model.teacher, options), config.distillation.top_k)
    student, _ = load_student(config.model, config.training.seed, options)
    shapes = teacher.model.facts, student.facts
    adapters = (
        seeded_adapters(*shapes, config.training.seed)
        if config.model.adapters is None
        else load_adapters(Path(config.model.adapters), *shapes)
    )
    choose_trained_parts(student, config)
    weights = term_weights(config.distillation)
    if steps := committed_steps(run):
        weights = weights_in_use(config.distillation, read_manifest(step_folder(run, steps[0])))
        saved = saved_student(run, None, merge=False)
        adapters.load_state_dict(saved.adapters)
        for name, parameter in student.named_parameters():
            parameter.data.copy_(saved.tensors[name])
    step = StudentStep(student, adapters.to(options.dtype), config.distillation)
    return _measure(step, teacher, batch, config.distillation, weights)


def _first_samples(config: Config, index_file: Path, samples: int) -> Batch:
    encoder = student_encoder(config)
    index = cached_index(index_file, config.data, encoder)
    order = islice(_first_epoch(build_sampler(config, index)), samples)
    reader = ExampleReader(config.data, index, encoder)
    settings = encoder.collate_settings(
        attention_rows=config.distillation.attention_rows,
        logit_positions=config.distillation.logit_positions,
        packing=config.training.packing,
        top_k=config.distillation.top_k,
    )
    return collate([reader(number) for number in order], settings)


def _first_epoch(sampler: GlobalBatchSampler) -> Iterator[int]:
    for step in range(sampler.steps_per_epoch):
        yield from sampler.samples_of_step(step)


def _measure(
    step: StudentStep,
    teacher: TeacherModel,
    batch: Batch,
    distillation: DistillationSection,
    weights: dict[str, float],
) -> ProbeResult:
    counts = element_counts(batch.counts, step.sizes())
    targets, head = teacher(batch), teacher.model.head.cut(teacher.model.head.weight)
    sums = step(batch, (0.0,) * len(TERMS), targets, head).sums.tolist()
    values = means(dict(zip(TERMS, sums, strict=True)), counts)
    alone = term_scales(counts, dict.fromkeys(TERMS, 1.0), 1.0)
    by_part = term_gradient_norms(step, batch, alone, targets, head)
    norms = dict(zip(TERMS, by_part.norm(dim=1).tolist(), strict=True))
    norms["total"] = _gradient_norm(step, batch, term_scales(counts, weights, 1.0), targets, head)
    parts = list(parts_of(step.student))
    shares = {
        term: {part: weights[term] * norm for part, norm in zip(parts, row, strict=True)}
        for term, row in zip(TERMS, by_part.tolist(), strict=True)
    }
    vision = values["vision_all"] + distillation.vision_focus_weight * values["vision_focus"]
    shown = {**values, "vision": vision, "total": total(values, weights)}
    rename = {"divergence": distillation.divergence}
    return ProbeResult(
        terms={rename.get(name, name): value for name, value in shown.items()},
        counts={rename.get(name, name): value for name, value in counts.items()},
        weights={rename.get(name, name): value for name, value in weights.items()},
        gradient_norms={rename.get(name, name): value for name, value in norms.items()},
        parts={rename.get(name, name): value for name, value in shares.items()},
    )


def _gradient_norm(
    step: StudentStep,
    batch: Batch,
    scales: tuple[float, ...],
    targets: TeacherTargets,
    head: torch.Tensor,
) -> float:
    """L2 norm of the loss's gradient with respect to the student, without the adapters."""
    parameters = [parameter for parameter in step.student.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(step(batch, scales, targets, head).loss, parameters, allow_unused=True)
    return float(nn.utils.get_total_norm([gradient for gradient in found if gradient is not None]))
