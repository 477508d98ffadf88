"""One run: a condition with a seed, from the initial student to its record."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignkd.config.schema import TrainingSection
from alignkd.engine.optimizer_step import term_weights
from alignkd.engine.student_step import StudentStep
from alignkd.engine.term_gradients import parts_of, term_gradient_norms
from alignkd.losses.balance import LearnedWeights, balanced_weights
from alignkd.losses.total import TERMS
from alignkd.models.adapters import seeded_adapters
from benchmarks.evidence.answers import right_answers
from benchmarks.evidence.bench import Bench
from benchmarks.evidence.conditions import Condition
from benchmarks.evidence.loop import Distillation, Part, train
from benchmarks.evidence.models import new_student
from benchmarks.evidence.patches import VARIANTS
from benchmarks.evidence.task import Sample

LOOKS = 10  # validations of a run, for its curve
GRADIENT_LOOKS = 10  # steps whose gradient is taken apart


@dataclass(frozen=True)
class Settings:
    """Chosen on validation for the student without a teacher (docs/evidence.md)."""

    learning_rate: float = 5e-4
    steps: int = 2000
    batch: int = 32

    def training(self, seed: int, clip: float = 1.0) -> TrainingSection:
        return TrainingSection(
            learning_rate=self.learning_rate,
            global_batch_size=self.batch,
            max_gradient_norm=clip,
            seed=seed,
        )


@dataclass
class Outcome:
    curve: list[dict[str, Any]] = field(default_factory=list)
    gradients: list[dict[str, Any]] = field(default_factory=list)
    weights: list[dict[str, Any]] = field(default_factory=list)  # of a condition in which they change


@dataclass
class Clock:
    """Seconds of the training steps alone: batches, forward, backward, optimizer."""

    wall: float = 0.0
    cpu: float = 0.0

    @contextlib.contextmanager
    def adding(self, sign: int = 1) -> Iterator[None]:
        wall, cpu = time.monotonic(), time.process_time()
        yield
        self.wall += sign * (time.monotonic() - wall)
        self.cpu += sign * (time.process_time() - cpu)

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """For what a training run would not do; within :meth:`adding`."""
        return self.adding(-1)


def train_once(
    bench: Bench, condition: Condition, seed: int, settings: Settings, *, with_test: bool = True
) -> dict[str, Any]:
    """The record of a run. The same seed gives all conditions the same initial student and data order."""
    section, steps = condition.section(), round(settings.steps * condition.steps)
    student = new_student(bench.cache, seed)
    adapters, distillation = None, None
    variant = None if condition.attention is None else VARIANTS[condition.attention]
    if section.enabled:
        targets = bench.targets(condition.attention, condition.better_teacher).with_top_k(section.top_k)
        distillation = Distillation(
            targets,
            term_weights(section),
            condition.labels_only,
            None if variant is None else variant.elements,
        )
        adapters = seeded_adapters(_TeacherShape(targets.joined), student.facts, seed)
        adapters.requires_grad_(not condition.frozen_adapters)
    module = StudentStep(student, adapters, section)
    training = settings.training(seed, condition.clip)
    learned = LearnedWeights(term_weights(section)) if section.balance == "learned" else None
    outcome, clock, validation = Outcome(), Clock(), bench.examples("validation")

    def look(step: int) -> None:
        if step % max(steps // LOOKS, 1) == 0 or step == steps:
            with clock.paused():
                right = by_kind(validation.samples, right_answers(student, validation))
            outcome.curve.append({"step": step, "accuracy": {kind: _mean(of) for kind, of in right.items()}})
            if learned is not None:
                outcome.weights.append({"step": step, "weights": learned.weights})

    def take_apart(step: int, parts: list[Part]) -> None:
        if distillation is not None and step % max(steps // GRADIENT_LOOKS, 1) == 0:
            part = parts[0]
            with clock.paused():
                norms = term_gradient_norms(
                    module, part.batch, part.scales, part.targets, distillation.source.head
                )
            outcome.gradients.append({"step": step, "norms": _named(norms.tolist(), list(parts_of(student)))})

    def balance(step: int, parts: list[Part]) -> None:
        """Its condition pays for it: the clock goes on."""
        if distillation is None or condition.balance_every is None or step % condition.balance_every:
            return
        part = parts[0]
        norms_TP = term_gradient_norms(
            module, part.batch, part.scales, part.targets, distillation.source.head
        )
        norms = dict(zip(TERMS, norms_TP.norm(dim=1).tolist(), strict=True))
        distillation.weights.update(balanced_weights(norms, distillation.weights, term_weights(section)))
        outcome.weights.append({"step": step, "weights": dict(distillation.weights)})

    def learn(means: Mapping[str, float]) -> None:
        if learned is not None and distillation is not None:
            learned.learn(means)
            distillation.weights.update(learned.weights)

    def before_step(step: int, parts: list[Part]) -> None:
        take_apart(step, parts)
        balance(step, parts)

    samples = bench.examples("train", section.top_k)
    with contextlib.nullcontext() if variant is None else variant.for_student(student), clock.adding():
        clipped = train(module, samples, training, steps, distillation, look, before_step, learn)
    record: dict[str, Any] = {
        "condition": condition.as_dict(),
        "seed": seed,
        "steps": steps,
        "learning_rate": settings.learning_rate,
        "batch": settings.batch,
        "teacher": bench.teacher_of(distilled=section.enabled),
        "data": bench.data,
        **({"better_teacher": bench.better_teacher} if condition.better_teacher else {}),
        "clipped": round(clipped, 4),
        "validation": outcome.curve,
        "gradient_norms": outcome.gradients,
        "weights": outcome.weights,
    }
    if with_test:
        test = bench.examples("test")
        right = by_kind(test.samples, right_answers(student, test))
        record["test"] = {kind: "".join(str(int(one)) for one in of) for kind, of in right.items()}
    return record | {"seconds": {"wall": round(clock.wall, 1), "cpu": round(clock.cpu, 1)}}


def by_kind(samples: Sequence[Sample], right: Sequence[bool]) -> dict[str, list[bool]]:
    found: dict[str, list[bool]] = {}
    for sample, one in zip(samples, right, strict=True):
        found.setdefault(sample.kind, []).append(one)
    return found


class _TeacherShape:
    """What the adapters need to know of the teacher, from its targets."""

    def __init__(self, targets: Any) -> None:
        self.num_attention_heads = int(targets.block_IHMV.shape[1])
        self.hidden_size = int(targets.vision_tokens_IVD.shape[2])


def _named(norms: list[list[float]], parts: list[str]) -> dict[str, dict[str, float]]:
    """Four digits are enough, and keep the record small."""
    return {
        term: {part: float(f"{value:.4g}") for part, value in zip(parts, row, strict=True)}
        for term, row in zip(TERMS, norms, strict=True)
        if any(row)
    }


def _mean(values: Sequence[bool]) -> float:
    return round(statistics.fmean(values), 4)
