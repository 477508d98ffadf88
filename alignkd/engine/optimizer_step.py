"""One optimizer step: count, agree, then teacher forward, student forward and backward per micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from alignkd.config.schema import DistillationSection
from alignkd.data.batch import Batch, TermCounts
from alignkd.engine.ranks import Ranks
from alignkd.engine.signals import StopRequest
from alignkd.engine.stopwatch import Stopwatch
from alignkd.errors import AlignkdError, TrainingError
from alignkd.losses.terms import element_counts, term_scales, term_weights
from alignkd.teacher.lookahead import targets_ahead
from alignkd.teacher.provider import Teacher


@dataclass(frozen=True)
class WindowFacts:
    """What all ranks know of an optimizer step before its first forward."""

    counts: TermCounts  # over all ranks and micro-batches
    elements: dict[str, int]  # divisors of the terms' sums
    usr1: bool  # some rank was asked to stop
    term: bool
    written: bool = True  # every rank's checkpoint writer is done


@dataclass(frozen=True)
class StepSums:
    """What the device knows after an optimizer step."""

    terms: torch.Tensor  # this rank's sums, fp32 [len(TERMS)]
    gradient_norm: torch.Tensor | float | None  # over all ranks, before clipping


def agree_on_window(
    window: list[Batch],
    sizes: Any,
    stop: StopRequest,
    ranks: Ranks,
    written: bool = True,
    problem: AlignkdError | None = None,
) -> WindowFacts:
    """One host all-reduce for the counts of the coming step, the stop flags, and whether this rank's
    checkpoint is ``written``. No device is involved.

    A ``problem`` of any rank, for which it cannot take the step, is raised on all of them.
    """
    local = sum((batch.counts for batch in window), start=TermCounts())
    flags = (stop.usr1, stop.term, written, problem is not None)
    summed = ranks.sum_on_host([*local.as_list(), *map(int, flags)])
    usr1, term, writers, problems = summed[-len(flags) :]
    if problems:
        ranks.raise_together(problem)
    counts = TermCounts.from_list(summed[: -len(flags)])
    if counts.samples == 0:
        raise TrainingError(
            f"all {counts.skipped} samples of a global batch were bad (data.on_bad_sample: skip); is an "
            "image folder not there? Set data.on_bad_sample to error to see the first one"
        )
    return WindowFacts(
        counts, element_counts(counts, sizes), usr1 > 0, term > 0, written=writers == ranks.world_size
    )


def run_optimizer_step(
    engine: Any,
    teacher: Teacher | None,
    window: list[Batch],
    facts: WindowFacts,
    distillation: DistillationSection,
    ranks: Ranks,
    teacher_watch: Stopwatch,
    lookahead: int | None = None,
) -> StepSums:
    """Train on one accumulation window; its length may differ from step to step, but not between ranks.
    ``lookahead``: micro-batches that one teacher forward serves (None: the whole window).

    The loss of a micro-batch is scaled by ranks x accumulation / count: DeepSpeed averages gradients over
    ranks and divides by its *configured* accumulation in ``backward``, whatever the window's length is, so
    the gradient does not depend on how the batch is split.
    """
    factor = float(ranks.world_size * engine.gradient_accumulation_steps())
    scales = term_scales(facts.elements, term_weights(distillation), factor)
    window = [batch.to(ranks.device) for batch in window]
    head, ahead = None, None
    if teacher is not None:
        with teacher_watch:
            # Gathered once for the whole window, held until its last backward is done.
            head = teacher.head_weight()
        ahead = targets_ahead(teacher, window, lookahead, teacher_watch)
    sums = torch.zeros(len(scales), device=ranks.device)
    own_norm = None
    for number, batch in enumerate(window):
        is_last = number == len(window) - 1
        targets = None if ahead is None else next(ahead)
        engine.set_gradient_accumulation_boundary(is_last)
        output = engine(batch, scales, targets, head)
        engine.backward(output.loss)
        if is_last:
            own_norm = _norm_that_deepspeed_drops(engine)
        engine.step()
        sums += output.sums
    return StepSums(sums, engine.get_global_grad_norm() if own_norm is None else own_norm)


def _norm_that_deepspeed_drops(engine: Any) -> torch.Tensor | None:
    """Stage 0 in fp32 clips without keeping the norm; the gradients are averaged after the last backward."""
    if engine.zero_optimization() or engine.bfloat16_enabled() or engine.fp16_enabled():
        return None
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def peak_memory_bytes() -> int:
    """Peak of the device's allocator; on the CPU the peak resident memory of this process."""
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        return int(accelerator.max_memory_allocated())
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
