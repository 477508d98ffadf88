"""Which samples belong to which optimizer step, micro-batch and rank.

The samples of a step are a pure function of (index, seed, step), their split of that and the number of ranks:
nothing depends on loader workers, nor on what was drawn before, so a run resumes anywhere and at any size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from alignkd.data.index import Index
from alignkd.data.micro_batches import split_by_samples, split_by_tokens
from alignkd.errors import UserError

IntArray = np.ndarray[Any, np.dtype[np.int64]]


class GlobalBatchSampler:
    """Steps count from 0 over all epochs; samples are numbers of elements of the index.

    Without ``token_budget`` it is ``micro_batch_size`` that splits a global batch. ``packed``: a micro-batch
    is one row, without padding.
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
            raise UserError(f"data.sources[].weight: {index.weights} of few samples leave none in an epoch")

    @property
    def samples_per_epoch(self) -> int:
        return sum(
            int(weight) * len(members) + _fraction(weight, len(members))
            for weight, members in zip(self._index.weights, self._members, strict=True)
        )

    @property
    def steps_per_epoch(self) -> int:
        """The last global batch of an epoch is smaller when the samples do not divide."""
        return -(-self.samples_per_epoch // self._global_batch_size)

    def total_steps(self, epochs: int, max_steps: int | None) -> int:
        steps = epochs * self.steps_per_epoch
        return steps if max_steps is None else min(steps, max_steps)

    def samples_before(self, step: int) -> int:
        """Samples that training has consumed when it stands before ``step``."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs * self.samples_per_epoch + steps * self._global_batch_size

    def samples_of_step(self, step: int) -> list[int]:
        """The global batch of an optimizer step, in the epoch's order."""
        epoch, number = divmod(step, self.steps_per_epoch)
        start = number * self._global_batch_size
        batch: list[int] = self._order(epoch)[start : start + self._global_batch_size].tolist()
        return batch

    def micro_batches(self, step: int, rank: int, world_size: int, accumulation: int) -> list[list[int]]:
        """This rank's micro-batches of a step, as many as every other rank's; some are empty where samples
        are few. Without a token budget there are ``accumulation`` of them.

        The batch is cut before ranks come in: micro-batch j is the j // world_size-th of rank j % world_size.
        What ranks run at the same time is therefore of similar cost.
        """
        # Padded, text keeps to itself (LLaVA's grouping by modality and length).
        order = self._length if self._packed else self._modality_and_length
        batch = sorted(self.samples_of_step(step), key=order)
        lengths = [int(self._index.length[sample]) for sample in batch]
        if self._token_budget is None:
            size = self._micro_batch_size
            assert self._global_batch_size <= world_size * accumulation * size, "the batch fits the ranks"
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
            # The epoch before it stays: a loader that fetches ahead asks for both in turn.
            self._cached = {old: order for old, order in self._cached.items() if old == epoch - 1}
            self._cached[epoch] = self._draw(epoch)
        return self._cached[epoch]

    def _draw(self, epoch: int) -> IntArray:
        """Every sample as often as its source's weight says, shuffled."""
        pool: list[IntArray] = []
        for source, (weight, members) in enumerate(zip(self._index.weights, self._members, strict=True)):
            pool += [members] * int(weight)
            chosen = _shuffle(len(members), self._seed, epoch, source + 1)
            pool.append(members[chosen[: _fraction(weight, len(members))]])
        samples = np.concatenate(pool)
        shuffled: IntArray = samples[_shuffle(len(samples), self._seed, epoch, 0)]
        return shuffled


def _fraction(weight: float, size: int) -> int:
    """How many samples of a source come once more than the others, for the part after the point."""
    return round((weight - int(weight)) * size)


def _shuffle(size: int, seed: int, epoch: int, stream: int) -> IntArray:
    """A permutation that no release of numpy may change: raw bits of a seed sequence are guaranteed."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch, stream])).random_raw(size)
    return np.argsort(bits, kind="stable").astype(np.int64)
