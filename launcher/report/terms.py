"""What each term of the loss did: its first and last value, and its share of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alignkd.config.dotted import get_value
from alignkd.run_folder.metrics import WEIGHT_OF
from launcher.report.columns import Columns

_DIVERGENCES = ("reverse_kl", "forward_kl", "js")


@dataclass(frozen=True)
class Term:
    """Weights are those in use, which differ only where distillation.balance moves them; a share is weight x
    value over the sum of all terms."""

    name: str
    first_weight: float
    last_weight: float
    first: float
    last: float
    first_share: float
    last_share: float


def weights_of(config: Mapping[str, Any]) -> dict[str, float]:
    """Term -> its weight in the loss, by the configuration of a run; a term without a weight is left out."""
    section = config.get("distillation")
    if not isinstance(section, Mapping) or section.get("enabled") is False:
        return {"ce": 1.0}

    def number(*keys: str, default: float) -> float:
        value = get_value(section, keys, default)
        return float(value) if isinstance(value, int | float) else default

    divergence = section.get("divergence")
    vision = number("weights", "vision", default=1.0)
    weights = {
        "ce": 1.0,
        divergence if divergence in _DIVERGENCES else _DIVERGENCES[0]: number(
            "weights", "logits", default=1.0
        ),
        "attention": number("weights", "attention", default=1.0),
        "vision_all": vision,
        "vision_focus": vision * number("vision_focus_weight", default=0.1),
    }
    return {name: weight for name, weight in weights.items() if weight}


def terms_of(columns: Columns, config: Mapping[str, Any]) -> list[Term]:
    """The terms that the metrics have, in the order of the sum. Empty while there are no rows."""
    configured = weights_of(config)
    ends = {name: found for name in configured if (found := columns.first_and_last(name)) is not None}
    weights = {
        name: columns.first_and_last(WEIGHT_OF + name) or (configured[name], configured[name])
        for name in ends
    }
    sums = [sum(weights[name][end] * values[end] for name, values in ends.items()) for end in (0, 1)]
    return [
        Term(
            name,
            *weights[name],
            *values,
            *(_share(weights[name][end] * values[end], sums[end]) for end in (0, 1)),
        )
        for name, values in ends.items()
    ]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
