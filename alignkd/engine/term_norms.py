"""The gradient norm of each loss term while a run trains, every so many steps, to be shown or for the weights
to follow."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist

from alignkd.data.batch import Batch
from alignkd.engine.balance import Balance
from alignkd.engine.optimizer_step import teacher_side
from alignkd.engine.state import TrainingState
from alignkd.engine.term_gradients import term_gradient_norms
from alignkd.losses.total import TERMS, element_counts, term_scales


class TermNorms:
    """``logging.gradient_norms_every`` and ``distillation.balance`` = gradient of one run."""

    def __init__(self, state: TrainingState, balance: Balance) -> None:
        self._state, self._balance = state, balance
        self._every = state.config.logging.gradient_norms_every

    def columns(self, step: int, window: list[Batch]) -> dict[str, float]:
        """Columns of the row of ``step``, before it is taken; none where it is not due. Where it is due for
        the weights, they follow. Waits for the device. Collective.

        Each is the norm of the student's gradient of a weighted term on the first micro-batch of a rank: the
        root mean square over the ranks whose micro-batch has the term, so that few images make it noisier and
        not smaller; 0 where none has. What differs between micro-batches averages out in the step itself, so
        its gradient is smaller.
        """
        follows = self._balance.is_due(step)
        if not follows and (self._every is None or step % self._every != 0):
            return {}
        state, distillation = self._state, self._state.config.distillation
        module, batch = state.engine.module, window[0].to(state.ranks.device)
        counts = element_counts(batch.counts, module.sizes())
        scales = term_scales(counts, self._balance.weights, 1.0)
        devices = [] if state.ranks.device.type == "cpu" else [state.ranks.device]
        with torch.random.fork_rng(devices):  # dropout draws numbers, which the step shall not miss
            head, targets = teacher_side(state.teacher, [batch], contextlib.nullcontext(), None)
            squares = term_gradient_norms(module, batch, scales, next(targets), head).square().sum(dim=1)
        has_term = squares.new_tensor([counts[term] > 0 for term in TERMS])
        summed = torch.stack((squares, has_term))
        dist.all_reduce(summed)
        norms = dict(zip(TERMS, (summed[0] / summed[1].clamp(min=1)).sqrt().tolist(), strict=True))
        if follows:
            self._balance.follow(norms)
        rename = {"divergence": distillation.divergence}
        return {f"gradient_norm_of_{rename.get(term, term)}": norm for term, norm in norms.items()}
