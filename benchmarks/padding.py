"""What the split of a global batch costs: positions that are padding, and ranks that wait for the slowest.

Samples, splits and batches are the product's own; no model runs, so there can be many ranks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from alignkd.data.batch import IGNORE_INDEX
from alignkd.data.collate import CollateSettings, Example, collate
from alignkd.data.index import Index
from alignkd.data.sampler import GlobalBatchSampler
from benchmarks import report

GLOBAL_BATCH = 128  # as in the presets
MICRO_BATCH = 4
RANKS = (8, 32)
STEPS = 20
IntArray = np.ndarray[Any, np.dtype[np.int64]]
Split = list[list[list[int]]]  # rank, micro-batch, sample


@dataclass(frozen=True)
class Cost:
    """Means over steps. A position is a token, or padding that is computed like one."""

    method: str
    ranks: int
    padding: float  # share of all positions
    micro_batches: float  # per rank
    busiest: float  # positions of the rank with the most
    idle_step: float  # share of all ranks' time spent waiting if they synchronise once per step
    idle_micro_batch: float  # if they synchronise at every micro-batch, as a sharded student does


def split_costs(index: Index) -> list[Cost]:
    return [cost for ranks in RANKS for cost in _costs(index, ranks)]


def budget_of(index: Index) -> int:
    """Tokens that the largest micro-batch without a budget has, so that memory is the same."""
    return MICRO_BATCH * int(index.length.max())


def _costs(index: Index, ranks: int) -> list[Cost]:
    accumulation = GLOBAL_BATCH // (MICRO_BATCH * ranks)

    def splits(packed: bool, token_budget: int | None = None) -> list[Split]:
        sampler = GlobalBatchSampler(index, GLOBAL_BATCH, MICRO_BATCH, 0, token_budget, packed)
        return [
            [sampler.micro_batches(step, rank, ranks, accumulation) for rank in range(ranks)]
            for step in range(STEPS)
        ]

    by_length, budget = splits(packed=False), budget_of(index)
    methods: list[tuple[str, bool, list[Split]]] = [
        ("random order, padded", False, [_in_order(index, step, ranks) for step in range(STEPS)]),
        ("by length, padded", False, by_length),
        ("by length, packed", True, by_length),
        ("balanced, packed (the default)", True, splits(packed=True)),
        ("token budget, padded", False, splits(False, budget)),
        ("token budget, packed", True, splits(True, budget)),
    ]
    return [_cost(name, ranks, index, packing, steps) for name, packing, steps in methods]


def _in_order(index: Index, step: int, ranks: int) -> Split:
    """What the product does not do: micro-batches in the order of the samples."""
    batch = GlobalBatchSampler(index, GLOBAL_BATCH, MICRO_BATCH, seed=0).samples_of_step(step)
    micro = [batch[start : start + MICRO_BATCH] for start in range(0, len(batch), MICRO_BATCH)]
    return [micro[rank::ranks] for rank in range(ranks)]


def _cost(method: str, ranks: int, index: Index, packing: bool, steps: list[Split]) -> Cost:
    settings = CollateSettings(1, (3, 1, 1), packing=packing)
    tokens = slots = busiest = slowest = micro_batches = 0
    for split in steps:
        counts = [[collate(_examples(index, batch), settings).counts for batch in rank] for rank in split]
        tokens += sum(count.tokens for rank in counts for count in rank)
        slots_RM: IntArray = np.array([[count.slots for count in rank] for rank in counts])
        slots += int(slots_RM.sum())
        busiest += int(slots_RM.sum(axis=1).max())
        slowest += int(slots_RM.max(axis=0).sum())
        micro_batches += slots_RM.shape[1]
    return Cost(
        method,
        ranks,
        padding=1 - tokens / slots,
        micro_batches=micro_batches / len(steps),
        busiest=busiest / len(steps),
        idle_step=1 - slots / ranks / busiest,
        idle_micro_batch=1 - slots / ranks / slowest,
    )


def _examples(index: Index, samples: list[int]) -> list[Example]:
    """Of the samples' lengths; the tokens of an image are text here, since they cost the same."""
    lengths = [int(index.length[sample]) for sample in samples]
    return [Example([3] * length, [IGNORE_INDEX] * length, ()) for length in lengths]


def table(costs: list[Cost]) -> str:
    return report.table(
        [
            "split of the global batch",
            "ranks",
            "padding",
            "micro-batches a rank",
            "positions of the busiest rank",
            "idle, met once a step",
            "idle, met every micro-batch",
        ],
        [
            [
                cost.method,
                str(cost.ranks),
                f"{cost.padding:.1%}",
                f"{cost.micro_batches:.1f}",
                f"{cost.busiest:,.0f}",
                f"{cost.idle_step:.1%}",
                f"{cost.idle_micro_batch:.1%}",
            ]
            for cost in costs
        ],
    )


def as_results(costs: list[Cost]) -> list[dict[str, Any]]:
    return [asdict(cost) for cost in costs]
