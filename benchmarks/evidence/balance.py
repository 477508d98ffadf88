"""Weights that follow the gradient: every term of the teacher pulls as hard as the labels do."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from alignkd.losses.total import TERMS

LARGEST = 1e6  # of a term that hardly has a gradient


def balanced_weights(
    norms_TP: torch.Tensor, scaled_by: Mapping[str, float], base: Mapping[str, float]
) -> dict[str, float]:
    """Weights at which each term's gradient, over the whole student, is ``base`` times as long as that of the
    labels; halfway there in logarithms, because one batch is a noisy measure.

    ``norms_TP``: ``term_gradient_norms`` of a batch with the weights ``scaled_by``. A term without weight or
    gradient keeps what it has; lambda stays.
    """
    norms = dict(zip(TERMS, norms_TP.norm(dim=1).tolist(), strict=True))
    weights = dict(scaled_by)
    for term in ("divergence", "attention", "vision_all"):
        if scaled_by[term] > 0 and norms[term] > 0 and norms["ce"] > 0:
            wanted = base[term] * norms["ce"] / norms[term]  # times the weight it has
            weights[term] = min(scaled_by[term] * wanted**0.5, LARGEST)
    if scaled_by["vision_all"] > 0:
        weights["vision_focus"] = weights["vision_all"] * base["vision_focus"] / base["vision_all"]
    return weights
