from __future__ import annotations

import random

import pytest

from alignkd.data.micro_batches import split_by_samples, split_by_tokens

LENGTHS = [1, 3, 3, 4, 20]


def test_splitting_by_samples_uses_as_few_parts_as_possible():
    assert split_by_samples(LENGTHS, 2, packed=False) == [[0, 1], [2, 3], [4]]
    assert split_by_samples(LENGTHS, 2, packed=True) == [[0, 3], [1, 2], [4]]  # 5, 6 and 20 tokens
    assert split_by_samples([], 2, packed=False) == split_by_samples([], 2, packed=True) == []


def test_padded_parts_stay_within_the_token_budget():
    def split(lengths: list[int], ranks: int) -> list[list[int]]:
        return split_by_tokens(lengths, 10, packed=False, ranks=ranks)

    assert split(LENGTHS, 1) == [[0, 1], [2, 3], [4]]
    # Three are needed; four ranks make four, with the smallest limit that does.
    assert split(LENGTHS, 4) == [[0, 1], [2], [3], [4]]
    assert split([5], 4) == [[0]]
    assert split([9, 2, 2], 1) == [[0], [1, 2]]  # text, then images: not ascending
    assert split([], 4) == []


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_padded_parts_are_neighbours_within_the_budget(seed, ranks):
    generator = random.Random(seed)
    lengths = sorted(min(2048, 150 + int(generator.lognormvariate(5, 1))) for _ in range(256))
    parts = split_by_tokens(lengths, 4096, packed=False, ranks=ranks)
    assert [sample for part in parts for sample in part] == list(range(256))
    assert all(len(part) == 1 or max(lengths[i] for i in part) * len(part) <= 4096 for part in parts)
    # Not one sample a part: two neighbouring parts could rarely be one.
    assert len(parts) <= 1.3 * sum(lengths) / 4096 + ranks


def test_packed_parts_stay_within_the_token_budget():
    def split(lengths: list[int], ranks: int) -> list[list[int]]:
        return split_by_tokens(lengths, 10, packed=True, ranks=ranks)

    assert split(LENGTHS, 1) == [[0, 3], [1, 2], [4]]
    assert split(LENGTHS, 4) == [[1], [3], [0, 2], [4]]
    assert split([5], 4) == [[0]]
    # 18 tokens are two parts' worth, but no two of them fit in one.
    assert split([6, 6, 6], 1) == [[2], [1], [0]]
    assert split([], 4) == []


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_a_packed_budget_wastes_little(seed, ranks):
    """The parts are at most those of the ideal packing, a tenth more, and a round of the ranks."""
    generator = random.Random(seed)
    lengths = sorted(min(2048, 150 + int(generator.lognormvariate(5, 1))) for _ in range(256))
    parts = split_by_tokens(lengths, 8192, packed=True, ranks=ranks)
    assert sorted(sample for part in parts for sample in part) == list(range(256))
    assert all(sum(lengths[sample] for sample in part) <= 8192 for part in parts)
    assert len(parts) <= 1.1 * sum(lengths) / 8192 + ranks
    assert len(parts) % ranks == 0
