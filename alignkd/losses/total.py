"""Equation 7, ``L = L_Sup + L_A + L_V + L_RKLD``, with equation 5 inside: how the terms add up.

No term divides by anything. Each is a sum over elements; the engine divides it once by the number of its
elements in the whole optimizer step, over all ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

# Order of every vector of sums and scales: L_Sup, equation 6, equation 1, equation 4, equation 3. Users see
# "divergence" under the name of its kind (reverse_kl, forward_kl, js).
TERMS = ("ce", "divergence", "attention", "vision_all", "vision_focus")


class Counts(Protocol):
    """What an optimizer step holds, whatever the models."""

    @property
    def supervised(self) -> int: ...  # positions of L_Sup
    @property
    def logits(self) -> int: ...  # positions of the divergence
    @property
    def attention_pairs(self) -> int: ...  # pairs of a vision token and a text row after its image
    @property
    def vision_tokens(self) -> int: ...
    @property
    def focus_tokens(self) -> int: ...  # K of every image with at least one text row, or all if it has fewer


@dataclass(frozen=True)
class ElementSizes:
    """How many elements of a term stand behind one counted thing."""

    student_heads: int
    student_width: int


def element_counts(counts: Counts, sizes: ElementSizes) -> dict[str, int]:
    """Elements of each term: the divisors of the sums."""
    return {
        "ce": counts.supervised,
        "divergence": counts.logits,
        "attention": counts.attention_pairs * sizes.student_heads,
        "vision_all": counts.vision_tokens * sizes.student_width,
        "vision_focus": counts.focus_tokens * sizes.student_width,
    }


def weights_by_term(logits: float, attention: float, vision: float, focus: float) -> dict[str, float]:
    """Weight of each term in the total: equation 7, and equation 5 with lambda = ``focus``."""
    return {
        "ce": 1.0,
        "divergence": logits,
        "attention": attention,
        "vision_all": vision,
        "vision_focus": vision * focus,
    }


def means(sums: dict[str, float], counts: dict[str, int]) -> dict[str, float]:
    return {term: sums[term] / max(counts[term], 1) for term in TERMS}


def total(means_: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Equation 7."""
    return sum(weights[term] * means_[term] for term in TERMS)


def term_scales(counts: dict[str, int], weights: Mapping[str, float], factor: float) -> tuple[float, ...]:
    """Factors that make the loss out of a micro-batch's sums, in the order of TERMS. ``factor`` (ranks x
    accumulation) cancels DeepSpeed's own averages."""
    return tuple(factor * weights[term] / max(counts[term], 1) for term in TERMS)
