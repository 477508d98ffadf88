"""The terms by name, what one element of each is, and how they add up (equation 7)."""

from __future__ import annotations

from dataclasses import dataclass

from alignkd.config.schema import DistillationSection
from alignkd.data.batch import TermCounts

# Order of every vector of sums. "divergence" is shown under its own name (reverse_kl, forward_kl, js).
TERMS = ("ce", "divergence", "attention", "vision_all", "vision_focus")


@dataclass(frozen=True)
class ElementSizes:
    """Elements that one counted thing stands for."""

    student_heads: int
    student_width: int
    vision_tokens: int
    top_k: int


def element_counts(counts: TermCounts, sizes: ElementSizes) -> dict[str, int]:
    """Elements per term, the divisors of the sums (``method.md``: sums and counts)."""
    return {
        "ce": counts.supervised,
        "divergence": counts.logits,
        "attention": counts.attention_rows * sizes.vision_tokens * sizes.student_heads,
        "vision_all": counts.images * sizes.vision_tokens * sizes.student_width,
        "vision_focus": counts.focus_images * sizes.top_k * sizes.student_width,
    }


def term_weights(distillation: DistillationSection) -> dict[str, float]:
    """Weight of each term in the total; distillation off leaves the cross-entropy."""
    if not distillation.enabled:
        return {"ce": 1.0, "divergence": 0.0, "attention": 0.0, "vision_all": 0.0, "vision_focus": 0.0}
    weights = distillation.weights
    return {
        "ce": 1.0,
        "divergence": weights.logits,
        "attention": weights.attention,
        "vision_all": weights.vision,
        "vision_focus": weights.vision * distillation.vision_focus_weight,
    }


def means(sums: dict[str, float], counts: dict[str, int]) -> dict[str, float]:
    return {term: sums[term] / max(counts[term], 1) for term in TERMS}


def total(means_: dict[str, float], weights: dict[str, float]) -> float:
    return sum(weights[term] * means_[term] for term in TERMS)


def term_scales(counts: dict[str, int], weights: dict[str, float], factor: float) -> tuple[float, ...]:
    """Factors of a micro-batch's sums. ``factor`` (ranks x accumulation) cancels DeepSpeed's averages."""
    return tuple(factor * weights[term] / max(counts[term], 1) for term in TERMS)
