"""Splits a global batch into micro-batches of similar cost, independently of ranks.

A padded micro-batch costs its longest sample times its number of samples, so samples of similar length belong
together. A packed one costs the sum of its lengths, so each gets its share of long and short samples: ranks
that run in parallel then finish at the same time.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

Parts = list[list[int]]  # positions in ``lengths``, ascending; no part is empty


def split_by_samples(lengths: Sequence[int], size: int, packed: bool) -> Parts:
    """As few parts as possible of at most ``size`` samples each.

    ``lengths`` in tokens: ascending if packed; if padded, in the order in which samples may be grouped.
    """
    samples = range(len(lengths))
    if packed:
        return _spread(lengths, -(-len(lengths) // size), size)
    return [list(samples[start : start + size]) for start in samples[::size]]


def split_by_tokens(lengths: Sequence[int], budget: int, packed: bool, ranks: int) -> Parts:
    """As few parts as possible of at most ``budget`` tokens each, rounded up to a multiple of ``ranks``; a
    sample longer than the budget gets a part of its own. ``lengths`` as for :func:`split_by_samples`.

    Rounding up costs nothing, since ranks without a part would run an empty one, and makes parts smaller.
    """
    return _packed_within(lengths, budget, ranks) if packed else _padded_within(lengths, budget, ranks)


def _packed_within(lengths: Sequence[int], budget: int, ranks: int) -> Parts:
    needed = sum(min(length, budget) for length in lengths)
    parts = _round_up(-(-needed // budget), ranks)
    while True:
        found = _spread(lengths, parts, len(lengths))
        if all(len(part) == 1 or sum(lengths[i] for i in part) <= budget for part in found):
            return found
        parts += ranks


def _spread(lengths: Sequence[int], parts: int, most: int) -> Parts:
    """Longest sample first, assign each to the part with the fewest tokens that has less than ``most``
    samples. Parts are sorted by tokens, so that those of similar cost run at the same time."""
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
    wanted = _round_up(len(_neighbours(lengths, budget)), ranks)
    # Binary search for the smallest limit that needs no more parts; greedy filling is optimal for any limit.
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        if len(_neighbours(lengths, middle)) <= wanted:
            high = middle
        else:
            low = middle + 1
    return _neighbours(lengths, low)


def _neighbours(lengths: Sequence[int], limit: int) -> Parts:
    """Greedily from the left: each part as long as ``limit`` allows, with at least one sample."""
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


def _round_up(number: int, of: int) -> int:
    return -(-number // of) * of
