"""How a global batch becomes micro-batches of similar cost, before ranks come in.

A padded micro-batch costs its longest sample times its samples, so neighbours in length belong together. A
packed one costs the sum, whatever is in it, so each gets its share of long and short samples: ranks that run
side by side are then done at the same time.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

Parts = list[list[int]]  # positions in ``lengths``, ascending; no part is empty


def split_by_samples(lengths: Sequence[int], size: int, packed: bool) -> Parts:
    """``size`` samples at most in each of as few parts as that takes.

    ``lengths`` are tokens: ascending where packed; padded, in the order in which samples may be neighbours.
    """
    samples = range(len(lengths))
    if packed:
        return _spread(lengths, -(-len(lengths) // size), size)
    return [list(samples[start : start + size]) for start in samples[::size]]


def split_by_tokens(lengths: Sequence[int], budget: int, packed: bool, ranks: int) -> Parts:
    """Parts that cost at most ``budget`` tokens (a longer sample gets one of its own): as few as it allows,
    rounded up to a multiple of ``ranks``. ``lengths`` as for :func:`split_by_samples`.

    As many parts as the ranks will run anyway cost less each than fewer and some empty ones.
    """
    return _packed_within(lengths, budget, ranks) if packed else _padded_within(lengths, budget, ranks)


def _packed_within(lengths: Sequence[int], budget: int, ranks: int) -> Parts:
    needed = sum(min(length, budget) for length in lengths)
    parts = _up_to_a_multiple(-(-needed // budget), ranks)
    while True:
        found = _spread(lengths, parts, len(lengths))
        if all(len(part) == 1 or sum(lengths[i] for i in part) <= budget for part in found):
            return found
        parts += ranks


def _spread(lengths: Sequence[int], parts: int, most: int) -> Parts:
    """The longest sample first, each into the part that has the fewest tokens and less than ``most`` samples;
    then the parts by their tokens, so that those of about one cost run at the same time."""
    found: Parts = [[] for _ in range(parts)]
    open_parts = [(0, part) for part in range(parts)]  # a heap
    totals = [0] * parts
    for sample in reversed(range(len(lengths))):
        _, part = open_parts[0]
        found[part].append(sample)
        totals[part] += lengths[sample]
        if len(found[part]) < most:
            heapq.heapreplace(open_parts, (totals[part], part))
        else:
            heapq.heappop(open_parts)
    order = sorted((part for part in range(parts) if found[part]), key=lambda part: totals[part])
    return [found[part][::-1] for part in order]


def _padded_within(lengths: Sequence[int], budget: int, ranks: int) -> Parts:
    wanted = _up_to_a_multiple(len(_neighbours(lengths, budget)), ranks)
    # The smallest limit that needs no more parts; filling each part is the fewest for every limit.
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        if len(_neighbours(lengths, middle)) <= wanted:
            high = middle
        else:
            low = middle + 1
    return _neighbours(lengths, low)


def _neighbours(lengths: Sequence[int], limit: int) -> Parts:
    """From the left, each part as long as ``limit`` allows, one sample at least."""
    parts: Parts = []
    longest = 0
    for sample, length in enumerate(lengths):
        longest = max(longest, length)
        if parts and longest * (len(parts[-1]) + 1) <= limit:
            parts[-1].append(sample)
        else:
            parts.append([sample])
            longest = length
    return parts


def _up_to_a_multiple(number: int, of: int) -> int:
    return -(-number // of) * of
