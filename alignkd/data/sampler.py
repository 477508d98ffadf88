"""Which samples belong to which optimizer step, micro-batch and rank.

The samples of a step are a pure function of (index, seed, step), their split of that and the number of ranks:
nothing depends on loader workers, nor on what was drawn before, so a run resumes anywhere and at any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignkd.data.index import Index
from alignkd.errors import UserError

IntArray = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class TokenBudget:
    """Most tokens of a micro-batch (a longer sample gets one of its own)."""

    tokens: int
    padded: bool  # a micro-batch costs its longest sample times its samples, not their sum

    def cut(self, lengths: Sequence[int], parts: int) -> list[slice]:
        """Neighbours of ``lengths`` as parts of similar cost within the budget: as few as it allows, rounded
        up to a multiple of ``parts``.

        As many parts as the ranks will run anyway cost less each than fewer and some empty ones.
        """
        fewest = len(self._greedy(lengths, self.tokens))
        wanted = -(-fewest // parts) * parts
        # The smallest limit that needs no more parts; the greedy cut needs the fewest for every limit.
        low, high = 1, self.tokens
        while low < high:
            middle = (low + high) // 2
            if len(self._greedy(lengths, middle)) <= wanted:
                high = middle
            else:
                low = middle + 1
        return self._greedy(lengths, low)

    def _greedy(self, lengths: Sequence[int], limit: int) -> list[slice]:
        """From the left, each part as long as ``limit`` allows, one sample at least."""
        starts: list[int] = []
        longest = total = 0
        for number, length in enumerate(lengths):
            longest, total = max(longest, length), total + length
            cost = longest * (number + 1 - starts[-1]) if starts and self.padded else total
            if not starts or cost > limit:
                starts.append(number)
                longest = total = length
        return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(lengths)], strict=True)]


class GlobalBatchSampler:
    """Steps count from 0 over all epochs; samples are numbers of elements of the index."""

    def __init__(
        self,
        index: Index,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        budget: TokenBudget | None = None,
    ) -> None:
        self._index = index
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._seed = seed
        self._budget = budget
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

        Samples are sorted by modality and length, so that a micro-batch has little padding, and cut before
        ranks come in: micro-batch j is the j // world_size-th of rank j % world_size. What ranks run at the
        same time is therefore of similar length.
        """
        batch = sorted(self.samples_of_step(step), key=self._modality_and_length)
        if self._budget is None:
            size = self._micro_batch_size
            assert self._global_batch_size <= world_size * accumulation * size, "the batch fits the ranks"
            slices = [slice(start, start + size) for start in range(0, len(batch), size)]
        else:
            slices = self._budget.cut([int(self._index.length[sample]) for sample in batch], world_size)
            accumulation = -(-len(slices) // world_size)
        mine = [batch[part] for part in slices[rank::world_size]]
        return mine + [[] for _ in range(accumulation - len(mine))]

    def _modality_and_length(self, sample: int) -> tuple[bool, int, int]:
        index = self._index
        return bool(index.image_count[sample] > 0), int(index.length[sample]), sample

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
