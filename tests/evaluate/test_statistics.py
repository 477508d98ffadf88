import math

import numpy as np
import pytest

from alignkd.evaluate.statistics import (
    Difference,
    McNemar,
    Units,
    estimate,
    mcnemar,
    paired_difference,
    percent,
    ratio,
)


def questions(values, names=None):
    names = names or [str(number) for number in range(len(values))]
    return Units.of((name, (value, 1.0)) for name, value in zip(names, values, strict=True))


def f1(sums):
    return ratio(2 * sums[..., 0], 2 * sums[..., 0] + sums[..., 1])


def test_standard_error_of_a_share_is_the_textbook_one():
    found = estimate(questions([1, 1, 1, 0, 0, 0, 0, 0]), percent)
    assert found.value == pytest.approx(37.5)
    assert found.standard_error == pytest.approx(100 * math.sqrt(0.375 * 0.625 / 7))


def test_standard_error_of_fractions_is_s_over_root_n():
    values = [0.3, 0.6, 1.0, 0.0, 0.9]
    expected = 100 * np.std(values, ddof=1) / math.sqrt(5)
    assert estimate(questions(values), percent).standard_error == pytest.approx(expected)


def test_questions_about_one_image_count_as_one_draw():
    # Two images, each all right or all wrong: as uncertain as two questions, not as eight.
    found = estimate(questions([1] * 4 + [0] * 4, ["a"] * 4 + ["b"] * 4), percent)
    assert found.standard_error == pytest.approx(50.0)


def test_jackknife_of_f1_agrees_with_a_bootstrap():
    random = np.random.default_rng(1)
    rows = [(str(unit), random.integers(0, 4, size=2)) for unit in range(400)]
    units = Units.of(rows)
    found = estimate(units, f1).standard_error
    drawn = [units.counts[random.integers(400, size=400)].sum(axis=0) for _ in range(2000)]
    assert found == pytest.approx(np.std(f1(np.array(drawn))), rel=0.08)


def test_strata_add_their_variances():
    rows = [
        ("a/1", (1, 1, 0, 0)),
        ("a/2", (0, 1, 0, 0)),
        ("b/1", (0, 0, 1, 1)),
        ("b/2", (0, 0, 1, 1)),
        ("b/3", (0, 0, 0, 1)),
    ]

    def both(sums):
        return percent(sums[..., :2]) + percent(sums[..., 2:])

    found = estimate(Units.of(rows, stratum=lambda name: name[0]), both)
    assert found.value == pytest.approx(50 + 200 / 3)
    assert found.standard_error == pytest.approx(math.sqrt(50**2 + 100**2 * (2 / 9) / 2))


def test_one_unit_has_no_standard_error():
    assert estimate(questions([1]), percent).standard_error is None


def test_nothing_of_nothing_is_zero():
    assert ratio(np.array([1.0, 0.0]), np.array([2.0, 0.0])).tolist() == [0.5, 0.0]


def test_interval_of_a_difference_covers_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        hard = random.random(150)
        first, second = (hard < 0.7).astype(float), ((hard + random.normal(0, 0.2, 150)) < 0.6).astype(float)
        found = paired_difference(questions(first), questions(second), percent, replicates=400)
        truth = 100 * (0.7 - EXPECTED_SECOND)
        covered += found.low <= truth <= found.high
    assert 180 <= covered <= 199


def _expected_second():
    random = np.random.default_rng(5)
    hard = random.random(2_000_000)
    return float(np.mean(hard + random.normal(0, 0.2, 2_000_000) < 0.6))


EXPECTED_SECOND = _expected_second()


def test_pairing_narrows_the_interval_and_the_seed_fixes_it():
    values = np.tile([1.0, 0.0, 1.0, 1.0], 50)
    better = values.copy()
    better[1] = 1.0
    found = paired_difference(questions(better), questions(values), percent)
    assert found == paired_difference(questions(better), questions(values), percent)
    few = [
        paired_difference(questions(better), questions(values), percent, replicates=7, seed=seed)
        for seed in range(9)
    ]
    assert len(set(few)) > 1
    assert found.value == pytest.approx(0.5)
    assert 0 <= found.low <= 0.5 <= found.high <= 2  # unpaired it would reach from -8 to 9


def test_strata_are_drawn_apart():
    rows = [("a/1", (1, 0)), ("b/1", (0, 1))]
    units = Units.of(rows, stratum=lambda name: name[0])
    nothing = Units(units.names, units.counts * 0, units.strata)
    # Each stratum has one unit, so every draw is the same.
    assert paired_difference(units, nothing, lambda sums: sums[..., 0] + sums[..., 1]) == Difference(2, 2, 2)


def test_models_with_other_questions_are_not_compared():
    with pytest.raises(ValueError, match="different questions"):
        paired_difference(questions([1, 0]), questions([1, 0], ["x", "y"]), percent)
    with pytest.raises(ValueError, match="different questions"):
        mcnemar({"a": True}, {"b": True})


def test_mcnemar_is_the_exact_sign_test():
    first = {str(number): number < 12 for number in range(20)}
    second = {str(number): number in (0, 1, 2, 15, 16) for number in range(20)}
    # 9 only first, 2 only second: 2 * (1 + 11 + 55) / 2^11
    assert mcnemar(first, second) == McNemar(9, 2, 134 / 2048)


def test_mcnemar_of_equal_models_is_one_and_large_counts_are_fine():
    same = {str(number): number % 3 == 0 for number in range(9)}
    assert mcnemar(same, same) == McNemar(0, 0, 1.0)
    even = {str(number): True for number in range(4000)} | {
        str(number): False for number in range(4000, 8000)
    }
    assert mcnemar(even, {name: not right for name, right in even.items()}).p_value == 1.0
    skewed = {str(number): number >= 1800 for number in range(4000)}
    found = mcnemar(skewed, {name: not right for name, right in skewed.items()})
    assert found.p_value == pytest.approx(math.erfc((400 - 1) / math.sqrt(4000) / math.sqrt(2)), rel=0.05)
