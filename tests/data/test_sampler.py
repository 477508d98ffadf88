from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from alignkd.data.index import Index
from alignkd.data.sampler import GlobalBatchSampler
from alignkd.errors import UserError


def index_of(sizes=(100,), weights=None, seed=0) -> Index:
    generator = np.random.default_rng(seed)
    count = sum(sizes)
    numbers = np.arange(count)
    return Index(
        source=np.repeat(np.arange(len(sizes)), sizes),
        entry=numbers,
        start=numbers,
        stop=numbers,
        length=generator.integers(10, 60, count),
        image_count=generator.integers(0, 3, count),
        weights=weights or (1.0,) * len(sizes),
        reports=(),
        max_length=100,
        fingerprint="",
    )


def epoch_of(sampler: GlobalBatchSampler, epoch: int) -> list[int]:
    first = epoch * sampler.steps_per_epoch
    return [
        s for step in range(first, first + sampler.steps_per_epoch) for s in sampler.samples_of_step(step)
    ]


@pytest.mark.parametrize("size", [1, 31, 32, 33, 100])
def test_every_sample_occurs_once_per_epoch(size):
    sampler = GlobalBatchSampler(index_of((size,)), 32, 4, seed=3)
    assert sampler.steps_per_epoch == -(-size // 32)
    for epoch in (0, 1, 5):
        assert sorted(epoch_of(sampler, epoch)) == list(range(size))
    assert len(sampler.samples_of_step(sampler.steps_per_epoch - 1)) == (size - 1) % 32 + 1


def test_the_order_depends_on_epoch_and_seed_only():
    index = index_of()
    first, again = (GlobalBatchSampler(index, 32, 4, seed=3) for _ in range(2))
    assert epoch_of(first, 0) != epoch_of(first, 1)
    assert epoch_of(first, 0) != epoch_of(GlobalBatchSampler(index, 32, 4, seed=4), 0)
    # Asked in another order, from another object: the same.
    steps = list(range(12))
    random.Random(0).shuffle(steps)
    drawn = {step: again.samples_of_step(step) for step in steps}
    assert [first.samples_of_step(step) for step in range(12)] == [drawn[step] for step in range(12)]


def test_the_order_equals_the_recorded_one():
    """A resumed run has to find its place with any later release of numpy."""
    assert GlobalBatchSampler(index_of((8,)), 8, 4, seed=1).samples_of_step(0) == [2, 4, 7, 5, 0, 6, 3, 1]


@pytest.mark.parametrize("size", [3, 29, 32, 100])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("packed", [False, True])
def test_no_split_changes_a_global_batch_or_its_micro_batches(size, seed, packed):
    sampler = GlobalBatchSampler(index_of((size,), seed=seed), 32, 4, seed, packed=packed)
    for step in range(sampler.steps_per_epoch):
        found = []
        for world_size, accumulation in ((1, 8), (2, 4), (4, 2), (8, 1), (3, 3)):
            micro = [
                sampler.micro_batches(step, rank, world_size, accumulation) for rank in range(world_size)
            ]
            assert all(len(batches) == accumulation for batches in micro)
            # Micro-batch j is the (j // world size)-th of rank j % world size.
            found.append([micro[r][a] for a in range(accumulation) for r in range(world_size) if micro[r][a]])
        assert all(batches == found[0] for batches in found)
        assert sorted(s for batch in found[0] for s in batch) == sorted(sampler.samples_of_step(step))
        assert len(found[0]) == -(-len(sampler.samples_of_step(step)) // 4)
        assert all(len(batch) <= 4 if packed else len(batch) == 4 for batch in found[0][:-1])


def test_a_rank_without_samples_gets_empty_micro_batches():
    sampler = GlobalBatchSampler(index_of((3,)), 32, 4, seed=0)
    assert sampler.micro_batches(0, 1, 2, 4) == [[], [], [], []]
    assert [len(batch) for batch in sampler.micro_batches(0, 0, 2, 4)] == [3, 0, 0, 0]


def test_padded_micro_batches_are_grouped_by_modality_and_length():
    index = index_of()
    sampler = GlobalBatchSampler(index, 32, 4, seed=0)
    batches = sampler.micro_batches(0, 0, 1, 8)
    flat = [sample for batch in batches for sample in batch]
    keys = [(index.image_count[sample] > 0, index.length[sample]) for sample in flat]
    assert keys == sorted(keys)
    mixed = sum(len({bool(index.image_count[s]) for s in batch}) > 1 for batch in batches)
    assert mixed <= 1


def test_packed_micro_batches_have_similar_costs():
    index = index_of((128,))
    spread = {}
    for packed in (False, True):
        sampler = GlobalBatchSampler(index, 128, 4, seed=0, packed=packed)
        tokens = [cost(index, batch, padded=False) for batch in sampler.micro_batches(0, 0, 1, 32)]
        assert tokens == sorted(tokens) or not packed, "those of a cost run side by side"
        spread[packed] = max(tokens) / (sum(tokens) / len(tokens))
    assert spread[False] > 1.5
    assert spread[True] < 1.05


def cost(index: Index, samples: list[int], padded: bool) -> int:
    lengths = [int(index.length[sample]) for sample in samples]
    return len(lengths) * max(lengths) if padded else sum(lengths)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tokens", [1, 55, 130, 10**6])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 50])
def test_a_token_budget_splits_every_step_within_it(world_size, tokens, padded):
    index = index_of((90,))
    sampler = GlobalBatchSampler(index, 32, 4, 0, tokens, not padded)
    for step in range(sampler.steps_per_epoch):
        ranks = [sampler.micro_batches(step, rank, world_size, 7) for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1, "as many micro-batches on every rank"
        found = [batch for batches in ranks for batch in batches if batch]
        assert sorted(sample for batch in found for sample in batch) == sorted(sampler.samples_of_step(step))
        assert all(len(batch) == 1 or cost(index, batch, padded) <= tokens for batch in found)
        # Not one micro-batch more than the budget asks for on the busiest rank.
        alone = GlobalBatchSampler(index, 32, 4, 0, tokens, not padded)
        fewest = len(alone.micro_batches(step, 0, 1, 7))
        assert len(ranks[0]) == -(-fewest // world_size)


@pytest.mark.parametrize("padded", [False, True])
def test_micro_batches_of_a_budget_have_similar_costs(padded):
    """Just above one micro-batch per rank: two for each, all half full, not one full and most empty."""
    index = index_of((64,))
    sampler = GlobalBatchSampler(index, 64, 4, 0, 10**6, not padded)
    (whole,) = sampler.micro_batches(0, 0, 1, 1)
    tokens = cost(index, whole, padded=False) // 4  # four and a bit
    sampler = GlobalBatchSampler(index, 64, 4, 0, tokens, not padded)
    costs = [
        cost(index, batch, padded) for rank in range(4) for batch in sampler.micro_batches(0, rank, 4, 1)
    ]
    assert len(costs) == 8
    assert max(costs) < 0.75 * tokens
    assert max(costs) - min(costs) < 2 * 60  # the longest sample has 60 tokens


def test_weights_repeat_samples_and_select_a_seeded_subset():
    sampler = GlobalBatchSampler(index_of((20, 10, 10), (1.0, 2.5, 0.3)), 16, 4, seed=0)
    assert sampler.samples_per_epoch == 20 + 25 + 3
    epochs = [Counter(epoch_of(sampler, epoch)) for epoch in range(2)]
    for counts in epochs:
        assert [counts[sample] for sample in range(20)] == [1] * 20
        assert sorted(counts[sample] for sample in range(20, 30)) == [2] * 5 + [3] * 5
        assert sorted(counts[sample] for sample in range(30, 40)) == [0] * 7 + [1] * 3
    assert epochs[0] != epochs[1]


def test_total_steps_round_up_per_epoch_and_obey_max_steps():
    sampler = GlobalBatchSampler(index_of((100,)), 32, 4, seed=0)
    assert sampler.total_steps(3, None) == 12
    assert sampler.total_steps(3, 5) == 5
    assert sampler.total_steps(1, 50) == 4


def test_samples_before_a_step_are_those_of_all_earlier_steps():
    sampler = GlobalBatchSampler(index_of((100,)), 32, 4, seed=0)
    consumed = 0
    for step in range(10):
        assert sampler.samples_before(step) == consumed
        consumed += len(sampler.samples_of_step(step))


def test_weights_that_leave_nothing_are_refused():
    with pytest.raises(UserError, match="weight"):
        GlobalBatchSampler(index_of((10,), (0.01,)), 32, 4, seed=0)
