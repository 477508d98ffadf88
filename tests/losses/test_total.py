"""Equations 5 and 7: counts, weights, scales and the total."""

from __future__ import annotations

import pytest

from alignkd.data.batch import TermCounts
from alignkd.losses.total import (
    TERMS,
    ElementSizes,
    element_counts,
    means,
    term_scales,
    total,
    weights_by_term,
)

SIZES = ElementSizes(student_heads=4, student_width=48)
COUNTS = TermCounts(
    supervised=10,
    logits=12,
    attention_pairs=7 * 144,
    vision_tokens=3 * 144,
    focus_tokens=2 * 16,
    tokens=900,
    samples=4,
)
ELEMENTS = {
    "ce": 10,
    "divergence": 12,
    "attention": 7 * 144 * 4,
    "vision_all": 3 * 144 * 48,
    "vision_focus": 2 * 16 * 48,
}
WEIGHTS = {"ce": 1.0, "divergence": 3.0, "attention": 5.0, "vision_all": 7.0, "vision_focus": 3.5}


def test_elements_of_each_term() -> None:
    assert element_counts(COUNTS, SIZES) == ELEMENTS
    assert tuple(ELEMENTS) == TERMS


def test_elements_of_two_windows_add_up() -> None:
    both = element_counts(COUNTS + COUNTS, SIZES)
    assert both == {term: 2 * count for term, count in ELEMENTS.items()}


def test_weights_of_each_term() -> None:
    assert weights_by_term(logits=3.0, attention=5.0, vision=7.0, focus=0.5) == WEIGHTS
    assert tuple(WEIGHTS) == TERMS


def test_the_total_is_the_weighted_sum_of_the_means() -> None:
    sums = {term: 2.0 * ELEMENTS[term] for term in TERMS}
    values = means(sums, ELEMENTS)
    assert values == dict.fromkeys(TERMS, 2.0)
    assert total(values, WEIGHTS) == pytest.approx(2.0 * (1 + 3 + 5 + 7 + 3.5))


def test_a_term_without_elements_is_its_sum() -> None:
    assert means(dict.fromkeys(TERMS, 0.0), dict.fromkeys(TERMS, 0)) == dict.fromkeys(TERMS, 0.0)
    assert term_scales(dict.fromkeys(TERMS, 0), WEIGHTS, 1.0) == tuple(WEIGHTS[term] for term in TERMS)


def test_scales_give_the_total_whatever_the_split() -> None:
    """Scaled sums of ranks x accumulation parts, averaged as by DeepSpeed, are the total of the step."""
    parts = [{"ce": 1.0, "divergence": 2.0, "attention": 3.0, "vision_all": 4.0, "vision_focus": 5.0}] * 3
    parts.append(dict.fromkeys(TERMS, 0.5))
    scales = term_scales(ELEMENTS, WEIGHTS, factor=len(parts))
    losses = [sum(scale * part[term] for scale, term in zip(scales, TERMS, strict=True)) for part in parts]
    whole = {term: sum(part[term] for part in parts) for term in TERMS}
    assert sum(losses) / len(parts) == pytest.approx(total(means(whole, ELEMENTS), WEIGHTS))
