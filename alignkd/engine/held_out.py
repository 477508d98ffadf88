"""The loss terms on held-out data, at the edge of a step. Training goes on as if nothing had been evaluated:
no gradient, no random number, and every module in the mode that it was in.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from alignkd.data.batch import TermCounts
from alignkd.data.held_out import HeldOut
from alignkd.data.loader import load_window
from alignkd.distributed.ranks import Ranks
from alignkd.engine.metrics import term_columns
from alignkd.engine.optimizer_step import all_reduce_step_info, teacher_side
from alignkd.engine.signals import StopRequest
from alignkd.engine.state import TrainingState
from alignkd.losses.total import TERMS, element_counts, means

log = logging.getLogger(__name__)


def held_out_losses(
    state: TrainingState,
    held_out: HeldOut,
    stop: StopRequest,
    alive: Callable[[int], None],
) -> dict[str, float] | None:
    """``loss`` and its terms over all held-out samples, under the names of metrics rows, on all ranks alike.

    None, with a line in the log, when a rank cannot read its samples or is told to stop, or all samples are
    bad. ``alive`` is called with the number of each window, since many may take longer than any step.
    Collective.
    """
    ranks, distillation = state.ranks, state.config.distillation
    sizes = state.engine.module.sizes()
    sums = torch.zeros(len(TERMS), dtype=torch.float64, device=ranks.device)
    counts = TermCounts()
    with _without_traces(state.engine, ranks), held_out.make_loader() as loader:
        windows = iter(loader)
        for number in range(len(loader)):
            alive(number)
            window, problem = load_window(windows)
            info = all_reduce_step_info(window, sizes, stop, ranks, problem=problem, may_be_empty=True)
            if info.usr1 or info.term:
                log.info("the evaluation is given up: the run has been told to stop")
                return None
            if info.failure is not None:
                log.warning("warning: no evaluation at this step: %s", info.failure)
                return None
            counts += info.counts
            window = [batch.to(ranks.device) for batch in window]
            head, targets = teacher_side(
                state.teacher, window, contextlib.nullcontext(), state.config.teacher.lookahead
            )
            for batch in window:
                sums += state.engine(batch, (0.0,) * len(TERMS), next(targets), head).sums
        if counts.samples == 0:
            log.warning(
                "warning: no evaluation at this step: all %d held-out samples are bad", counts.skipped
            )
            return None
        dist.all_reduce(sums)
    elements = element_counts(counts, sizes)
    return term_columns(means(dict(zip(TERMS, sums.tolist(), strict=True)), elements), distillation)


@contextlib.contextmanager
def _without_traces(engine: Any, ranks: Ranks) -> Iterator[None]:
    modes = [(module, module.training) for module in engine.modules()]
    devices = [] if ranks.device.type == "cpu" else [ranks.device]
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            engine.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training
