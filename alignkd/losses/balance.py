"""Weights of the teacher's terms that follow the training instead of staying as they were configured.

There are two rules. In both the labels, ``ce``, have the weight 1, a term whose configured weight is 0 stays
off, and L_V keeps lambda (equation 5). All of it is a few numbers on the host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

LARGEST = 1e6  # of a weight, whose term may hardly have a gradient or a value
LEARNING_RATE = 0.01  # of Adam, so that a weight changes by about 1 % a step at most
BALANCED = ("divergence", "attention", "vision_all")


def balanced_weights(
    norms: Mapping[str, float], weights: Mapping[str, float], base: Mapping[str, float]
) -> dict[str, float]:
    """Weights at which the gradient of each term is ``base`` times as long as that of the labels; halfway
    there in logarithms, because one batch is a noisy measure.

    ``norms``: length of each term's gradient over the whole student, with the present ``weights``. A term
    without a gradient, as in a batch without images, keeps its weight; all do where the labels have none.
    """
    found = dict(weights)
    for term in BALANCED:
        if weights[term] > 0 and 0 < norms[term] < math.inf and 0 < norms["ce"] < math.inf:
            wanted = base[term] * norms["ce"] / norms[term]  # times the weight it has
            found[term] = min(weights[term] * wanted**0.5, LARGEST)
    return with_focus(found, base)


class LearnedWeights:
    """One learned log-variance s per term of the teacher: weights are ``base`` x exp(-s), and s descends on
    weight x value + s / 2.

    This is homoscedastic uncertainty (Kendall et al. 2018, arXiv 1705.07115), but none for the labels, as in
    Beta-KD (arXiv 2603.21426) with one beta per term. s begins at 0 and rests where weight x value is 1/2: so
    ``base`` decides where the weights begin, and not where they end.
    """

    def __init__(self, base: Mapping[str, float]) -> None:
        """At least one term of ``base`` has a weight."""
        self._base = dict(base)
        self._log_variances = {
            term: torch.zeros((), dtype=torch.float64) for term in BALANCED if base[term] > 0
        }
        self._optimizer = torch.optim.Adam(self._log_variances.values(), lr=LEARNING_RATE)

    @property
    def weights(self) -> dict[str, float]:
        found = dict(self._base)
        for term, log_variance in self._log_variances.items():
            found[term] *= math.exp(-log_variance.item())
        return with_focus(found, self._base)

    def learn(self, means: Mapping[str, float]) -> None:
        """One step of Adam, by the mean of each term over an optimizer step. A term with the mean 0, which
        that step did not have, stays as it is, and so does one that is not finite (fp16)."""
        weighted = {term: weight * means[term] for term, weight in self.weights.items()}
        weighted["vision_all"] += weighted["vision_focus"]
        for term, log_variance in self._log_variances.items():
            slope = torch.full_like(log_variance, 0.5 - weighted[term])
            log_variance.grad = slope if 0 < weighted[term] < math.inf else None
        self._optimizer.step()
        for term, log_variance in self._log_variances.items():
            farthest = math.log(LARGEST)
            log_variance.clamp_(math.log(self._base[term]) - farthest, farthest)

    def state(self) -> dict[str, dict[str, float]]:
        """By term: the log-variance, and what Adam keeps of it. Exact in JSON."""
        return {
            term: {
                "log_variance": log_variance.item(),
                **{name: value.item() for name, value in self._optimizer.state[log_variance].items()},
            }
            for term, log_variance in self._log_variances.items()
        }

    def load_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Terms that ``state`` does not have begin anew."""
        for term, log_variance in self._log_variances.items():
            moments = dict(state.get(term, {"log_variance": 0.0}))
            log_variance.fill_(moments.pop("log_variance"))
            self._optimizer.state[log_variance] = {
                name: torch.tensor(value, dtype=torch.float32 if name == "step" else torch.float64)
                for name, value in moments.items()
            }


def with_focus(weights: dict[str, float], base: Mapping[str, float]) -> dict[str, float]:
    """L_V with lambda as in ``base``, exactly ``base`` where that is the weight of L_V."""
    if base["vision_all"] > 0:
        weights["vision_focus"] = base["vision_focus"] * (weights["vision_all"] / base["vision_all"])
    return weights
