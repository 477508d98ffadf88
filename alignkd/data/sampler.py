"""Assigns samples to optimizer steps, micro-batches and ranks.

The samples of a step are a pure function of (index, seed, step), and their split also of the number of
ranks. Nothing depends on loader workers or on earlier draws, so a run can resume at any step and on any
number of ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from alignkd.data.index import Index
from alignkd.data.micro_batches import split_by_samples, split_by_tokens
from alignkd.errors import UserError

IntArray = np.ndarray[Any, np.dtype[np.int64]]


class GlobalBatchSampler:
    """Steps are counted from 0 across epochs; a sample is the number of an element of the index.

    Global batches are split by ``token_budget``, or by ``micro_batch_size`` if it is None. ``packed``: a
    micro-batch is one row without padding.
    """

    def __init__(
        self,
        index: Index,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        token_budget: int | None = None,
        packed: bool = False,
    ) -> None:
        self._index = index
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._seed = seed
        self._token_budget = token_budget
        self._packed = packed
        self._members = [np.flatnonzero(index.source == source) for source in range(len(index.weights))]
        self._cached: dict[int, IntArray] = {}
        if self.samples_per_epoch == 0:
            raise UserError(
                f"data.sources[].weight: with the weights {index.weights}, an epoch has no samples"
            )

    @property
    def samples_per_epoch(self) -> int:
        return sum(
            int(weight) * len(members) + _fraction(weight, len(members))
            for weight, members in zip(self._index.weights, self._members, strict=True)
        )

    @property
    def steps_per_epoch(self) -> int:
        """Rounded up: the last global batch of an epoch may be smaller."""
        return -(-self.samples_per_epoch // self._global_batch_size)

    def total_steps(self, epochs: int, max_steps: int | None) -> int:
        steps = epochs * self.steps_per_epoch
        return steps if max_steps is None else min(steps, max_steps)

    def samples_before(self, step: int) -> int:
        """The number of samples that training has consumed before ``step``."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs * self.samples_per_epoch + steps * self._global_batch_size

    def samples_of_step(self, step: int) -> list[int]:
        """The global batch of an optimizer step, in the order of the epoch."""
        epoch, number = divmod(step, self.steps_per_epoch)
        start = number * self._global_batch_size
        batch: list[int] = self._order(epoch)[start : start + self._global_batch_size].tolist()
        return batch

    def micro_batches(self, step: int, rank: int, world_size: int, accumulation: int) -> list[list[int]]:
        """This rank's micro-batches of a step. Every rank has the same number of them, some of which may be
        empty. Without a token budget there are ``accumulation``.

        The batch is split independently of ranks: micro-batch j is number j // world_size of rank
        j % world_size. The micro-batches that ranks run in parallel therefore have similar costs.
        """
        # Padded batches group samples by modality and length, as LLaVA does.
        order = self._length if self._packed else self._modality_and_length
        batch = sorted(self.samples_of_step(step), key=order)
        lengths = [int(self._index.length[sample]) for sample in batch]
        if self._token_budget is None:
            size = self._micro_batch_size
            assert self._global_batch_size <= world_size * accumulation * size, (
                "the ranks have room for the batch"
            )
            parts = split_by_samples(lengths, size, self._packed)
        else:
            parts = split_by_tokens(lengths, self._token_budget, self._packed, world_size)
            accumulation = -(-len(parts) // world_size)
        mine = [[batch[position] for position in part] for part in parts[rank::world_size]]
        return mine + [[] for _ in range(accumulation - len(mine))]

    def _length(self, sample: int) -> tuple[int, int]:
        return int(self._index.length[sample]), sample

    def _modality_and_length(self, sample: int) -> tuple[bool, int, int]:
        index = self._index
        return bool(index.image_count[sample] > 0), *self._length(sample)

    def _order(self, epoch: int) -> IntArray:
        if epoch not in self._cached:
            # The previous epoch is kept: a loader that prefetches needs both.
            self._cached = {old: order for old, order in self._cached.items() if old == epoch - 1}
            self._cached[epoch] = self._draw(epoch)
        return self._cached[epoch]

    def _draw(self, epoch: int) -> IntArray:
        """Every sample, repeated according to the weight of its source, shuffled."""
        pool: list[IntArray] = []
        for source, (weight, members) in enumerate(zip(self._index.weights, self._members, strict=True)):
            pool += [members] * int(weight)
            chosen = _shuffle(len(members), self._seed, epoch, source + 1)
            pool.append(members[chosen[: _fraction(weight, len(members))]])
        samples = np.concatenate(pool)
        shuffled: IntArray = samples[_shuffle(len(samples), self._seed, epoch, 0)]
        return shuffled


def _fraction(weight: float, size: int) -> int:
    """The number of samples that the fractional part of a weight adds."""
    return round((weight - int(weight)) * size)


def _shuffle(size: int, seed: int, epoch: int, stream: int) -> IntArray:
    """A permutation that is the same in every numpy release, which guarantees raw bits but not shuffles."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch, stream])).random_raw(size)
    return np.argsort(bits, kind="stable").astype(np.int64)
