"""One optimizer step: all-reduce its counts, then run teacher and student on every micro-batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from alignkd.config.schema import DistillationSection
from alignkd.data.batch import Batch, TermCounts
from alignkd.distributed.ranks import Ranks
from alignkd.engine.signals import StopRequest
from alignkd.engine.stopwatch import Stopwatch, StudentWatches, student_watches
from alignkd.errors import AlignkdError, TrainingError
from alignkd.losses.total import ElementSizes, element_counts, term_scales, weights_by_term
from alignkd.teacher.lookahead import targets_ahead
from alignkd.teacher.provider import Teacher
from alignkd.teacher.targets import TeacherTargets


@dataclass(frozen=True)
class StepInfo:
    """What all ranks know of an optimizer step before its first forward."""

    counts: TermCounts  # over all ranks and micro-batches
    elements: dict[str, int]  # divisors of the terms' sums
    usr1: bool  # some rank received SIGUSR1
    term: bool  # some rank received SIGTERM
    written: bool = True  # the checkpoint writers of all ranks are idle
    failure: AlignkdError | None = None  # why the step cannot be taken: of the same kind on all ranks


@dataclass(frozen=True)
class StepSums:
    """What the device knows after an optimizer step."""

    terms: torch.Tensor  # this rank's sums, fp32 [len(TERMS)]
    gradient_norm: torch.Tensor | float | None  # over all ranks, before clipping


def term_weights(distillation: DistillationSection) -> dict[str, float]:
    """Configured weight of each term in the total; without distillation only the cross-entropy has one."""
    if not distillation.enabled:
        return weights_by_term(logits=0.0, attention=0.0, vision=0.0, focus=0.0)
    weights = distillation.weights
    return weights_by_term(
        logits=weights.logits,
        attention=weights.attention,
        vision=weights.vision,
        focus=distillation.vision_focus_weight,
    )


def all_reduce_step_info(
    window: list[Batch],
    sizes: ElementSizes,
    stop: StopRequest,
    ranks: Ranks,
    written: bool = True,
    problem: AlignkdError | None = None,
    may_be_empty: bool = False,
) -> StepInfo:
    """Sum the counts of the coming step, the stop flags, and whether this rank's checkpoint is ``written``:
    one all-reduce on the host, without the device. Collective.

    ``problem``: why this rank cannot take the step. Any rank's problem is the ``failure`` of all of them. A
    window without a sample is one too, unless it ``may_be_empty``.
    """
    local = sum((batch.counts for batch in window), start=TermCounts())
    flags = (stop.usr1, stop.term, written, problem is not None)
    summed = ranks.sum_on_host([*local.as_list(), *map(int, flags)])
    usr1, term, writers, problems = summed[-len(flags) :]
    counts = TermCounts.from_list(summed[: -len(flags)])
    failure: AlignkdError | None = None
    if problems:
        failure = ranks.shared_error(problem)
    elif counts.samples == 0 and not may_be_empty:
        failure = TrainingError(
            f"all {counts.skipped} samples of a global batch were bad (data.on_bad_sample: skip); is an "
            "image folder missing? Set data.on_bad_sample to error to see the first one"
        )
    elements = element_counts(counts, sizes)
    return StepInfo(
        counts, elements, usr1 > 0, term > 0, written=writers == ranks.world_size, failure=failure
    )


def run_optimizer_step(
    engine: Any,
    teacher: Teacher | None,
    window: list[Batch],
    info: StepInfo,
    distillation: DistillationSection,
    ranks: Ranks,
    teacher_watch: Stopwatch,
    lookahead: int | None = None,
    watches: StudentWatches | None = None,
    weights: Mapping[str, float] | None = None,
) -> StepSums:
    """Train on one accumulation window. Its length may differ between steps, but not between ranks.
    ``lookahead``: micro-batches that one teacher forward serves (None: the whole window). ``weights``: of the
    terms (None: as they are configured).

    The loss of a micro-batch is scaled by ranks x accumulation / count, because DeepSpeed averages gradients
    over ranks and divides by its *configured* accumulation in ``backward``, whatever the window's length. So
    the gradient does not depend on how the global batch is split.
    """
    factor = float(ranks.world_size * engine.gradient_accumulation_steps())
    scales = term_scales(info.elements, weights or term_weights(distillation), factor)
    window = [batch.to(ranks.device) for batch in window]
    head, targets_of_window = teacher_side(teacher, window, teacher_watch, lookahead)
    watches = watches or student_watches()
    sums = torch.zeros(len(scales), device=ranks.device)
    own_norm = None
    for number, batch in enumerate(window):
        is_last = number == len(window) - 1
        targets = next(targets_of_window)
        engine.set_gradient_accumulation_boundary(is_last)
        with watches.student:
            output = engine(batch, scales, targets, head)
            engine.backward(output.loss)
        with watches.optimizer:
            if is_last:
                own_norm = _norm_that_deepspeed_drops(engine)
            engine.step()
        sums += output.sums
    return StepSums(sums, engine.get_global_grad_norm() if own_norm is None else own_norm)


def teacher_side(
    teacher: Teacher | None, window: list[Batch], watch: AbstractContextManager[None], lookahead: int | None
) -> tuple[torch.Tensor | None, Iterator[TeacherTargets | None]]:
    """The teacher's head [vocab, D_T], None where a cache has its results, and its targets for each
    micro-batch; all None without a teacher. Collective when it is sharded."""
    if teacher is None:
        return None, iter([None] * len(window))
    with watch:
        # Gathered once for the whole window, and held until its last backward.
        head = teacher.head_weight()
    return head, targets_ahead(teacher, window, lookahead, watch)


def _norm_that_deepspeed_drops(engine: Any) -> torch.Tensor | None:
    """Stage 0 in fp32 clips without keeping the norm. Gradients are averaged by the end of the last backward,
    so it can be taken before the step."""
    if engine.zero_optimization() or engine.bfloat16_enabled() or engine.fp16_enabled():
        return None
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def peak_memory_bytes() -> int:
    """Peak of the device's allocator; on the CPU, peak resident memory of this process."""
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        return int(accelerator.max_memory_allocated())
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
