"""The training loop of one rank in one process: the product's step, losses and optimizer without DeepSpeed.

In fp32 on one rank DeepSpeed's stage 0 does the same arithmetic: backward, clipping, AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from alignkd.config.schema import TrainingSection
from alignkd.data.batch import Batch, TermCounts
from alignkd.data.collate import CollateSettings, Example, collate
from alignkd.engine.optimizer import build_optimizer, parameter_groups, schedule_factor, set_learning_rates
from alignkd.engine.student_step import StudentStep
from alignkd.losses.total import TERMS, element_counts, means, term_scales, weights_by_term
from alignkd.teacher.targets import TeacherTargets
from benchmarks.evidence.task import Sample

VISION_TOKENS = 16  # of an image
LABELS_ONLY = weights_by_term(logits=0.0, attention=0.0, vision=0.0, focus=0.0)


@dataclass(frozen=True)
class Examples:
    """Samples and what their images are (pixels, or the tower's patches), ready to be collated."""

    samples: Sequence[Sample]
    images: torch.Tensor  # [images, ...], of any precision
    top_k: int = 16

    def batch(self, numbers: Sequence[int]) -> Batch:
        shape = tuple(self.images.shape[1:])
        assert len(shape) == 3
        settings = CollateSettings(vision_tokens=VISION_TOKENS, image_shape=shape, top_k=self.top_k)
        return collate([self._example(number) for number in numbers], settings)

    def _example(self, number: int) -> Example:
        sample = self.samples[number]
        return replace(sample.example, images=tuple(self.images[grid].float() for grid in sample.grids))


class Source(Protocol):
    """Where the teacher's side of a batch comes from."""

    @property
    def head(self) -> torch.Tensor: ...
    def of(self, numbers: Sequence[int]) -> TeacherTargets: ...


@dataclass(frozen=True)
class Distillation:
    """What a training run gets from the teacher. ``weights`` by term; samples of ``labels_only`` kinds have
    no term of the teacher."""

    source: Source
    weights: dict[str, float]
    labels_only: tuple[str, ...] = ()
    attention_elements: Callable[[Batch, int], int] | None = None  # None: the product's


@dataclass(frozen=True)
class Part:
    """A micro-batch. ``elements``: of the whole step, by term. ``weights``: those of the labels, or those of
    the run, which may change until the micro-batch is run."""

    batch: Batch
    weights: Mapping[str, float]
    targets: TeacherTargets | None
    elements: dict[str, int]

    @property
    def scales(self) -> tuple[float, ...]:
        """The factors of its terms."""
        return term_scales(self.elements, self.weights, 1.0)


def order_of_steps(samples: int, batch: int, steps: int, seed: int) -> list[list[int]]:
    """The samples of each step: every epoch in an order of its own, the same for all conditions."""
    per_epoch = samples // batch
    found: list[list[int]] = []
    for epoch in range(-(-steps // per_epoch)):
        order = np.random.default_rng([seed, epoch]).permutation(samples)[: per_epoch * batch]
        found += order.reshape(per_epoch, batch).tolist()
    return found[:steps]


def train(
    module: StudentStep,
    examples: Examples,
    training: TrainingSection,
    steps: int,
    distillation: Distillation | None = None,
    after_step: Callable[[int], None] = lambda step: None,
    before_step: Callable[[int, list[Part]], None] = lambda step, parts: None,
    learn: Callable[[Mapping[str, float]], None] = lambda means: None,
) -> float:
    """``after_step`` and ``before_step`` get the number of steps done; weights that ``before_step`` changes
    count in the coming step. ``learn`` gets the mean of each term over the last step but one, because the
    product's means are known a step late. Returns the share of steps whose gradient was clipped."""
    module.train()
    optimizer = build_optimizer(parameter_groups(module, training), torch.device("cpu"))
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    order = order_of_steps(len(examples.samples), training.global_batch_size, steps, training.seed)
    clipped, late = 0, None
    for step, numbers in enumerate(order):
        parts = split_step(module, examples, numbers, distillation)
        before_step(step, parts)
        set_learning_rates(optimizer, schedule_factor(step, steps, training.warmup_ratio))
        optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(len(TERMS))
        for part in parts:
            head = None if part.targets is None or distillation is None else distillation.source.head
            output = module(part.batch, part.scales, part.targets, head)
            output.loss.backward()
            sums += output.sums
        if training.max_gradient_norm > 0:
            norm = torch.nn.utils.clip_grad_norm_(trained, training.max_gradient_norm)
            clipped += int(norm > training.max_gradient_norm)
        optimizer.step()
        if late is not None:
            learn(late)
        late = means(dict(zip(TERMS, sums.tolist(), strict=True)), parts[0].elements)
        after_step(step + 1)
    return clipped / len(order)


def split_step(
    module: StudentStep, examples: Examples, numbers: list[int], distillation: Distillation | None
) -> list[Part]:
    """The micro-batches of a step. Those without a teacher's term are one of their own, and count only where
    the labels do."""
    if distillation is None:
        batch = examples.batch(numbers)
        elements = element_counts(batch.counts, module.sizes())
        return [Part(batch, LABELS_ONLY, None, elements)]
    kinds = [examples.samples[number].kind for number in numbers]
    taught = [
        number for number, kind in zip(numbers, kinds, strict=True) if kind not in distillation.labels_only
    ]
    alone = [number for number, kind in zip(numbers, kinds, strict=True) if kind in distillation.labels_only]
    batches = [(examples.batch(some), some, some is taught) for some in (taught, alone) if some]
    with_terms = [batch for batch, _, with_teacher in batches if with_teacher]
    sizes = module.sizes()
    elements = element_counts(sum((batch.counts for batch in with_terms), start=TermCounts()), sizes)
    if distillation.attention_elements is not None:
        heads = sizes.student_heads
        elements["attention"] = sum(distillation.attention_elements(batch, heads) for batch in with_terms)
    elements["ce"] = sum(batch.counts.supervised for batch, _, _ in batches)
    return [
        Part(
            batch,
            distillation.weights if with_teacher else LABELS_ONLY,
            distillation.source.of(some) if with_teacher else None,
            elements,
        )
        for batch, some, with_teacher in batches
    ]
