"""Weights that follow the training, by hand in float64."""

from __future__ import annotations

import json
import math

import pytest
import torch

from alignkd.losses.balance import LARGEST, LEARNING_RATE, LearnedWeights, balanced_weights
from alignkd.losses.total import TERMS

BASE = {"ce": 1.0, "divergence": 0.7, "attention": 2.0, "vision_all": 3.0, "vision_focus": 0.6}


def means(step: int) -> dict[str, float]:
    """Of a made-up step; every third has no image."""
    found = {
        "ce": 2.0 / step,
        "divergence": 1.5 / step,
        "attention": 1e-3 * step,
        "vision_all": 0.4,
        "vision_focus": 0.9 / step,
    }
    return found if step % 3 else found | dict.fromkeys(TERMS[2:], 0.0)


def test_weights_move_to_gradients_as_long_as_that_of_the_labels_times_the_configured_weight() -> None:
    weights = dict(BASE)
    unit = {"ce": 3.0, "divergence": 6.0, "attention": 1e-3, "vision_all": 0.5, "vision_focus": 0.5}
    for _ in range(40):
        norms = {term: weights[term] * length for term, length in unit.items()}
        weights = balanced_weights(norms, weights, BASE)
    expected = {
        "ce": 1.0,
        "divergence": 0.7 * 3 / 6,
        "attention": 2 * 3 / 1e-3,
        "vision_all": 3 * 3 / 0.5,
        "vision_focus": 0.2 * 3 * 3 / 0.5,  # lambda is 0.2
    }
    assert weights == pytest.approx(expected, rel=1e-9)


def test_one_measurement_goes_half_of_the_way_in_logarithms() -> None:
    weights = BASE | {"divergence": 5.0}
    norms = {"ce": 4.0, "divergence": 10.0, "attention": 0.08, "vision_all": 12.0, "vision_focus": 99.0}
    found = balanced_weights(norms, weights, BASE)
    assert found == pytest.approx(
        {
            "ce": 1.0,
            "divergence": 5.0 * math.sqrt(0.7 * 4 / 10),
            "attention": 2.0 * math.sqrt(2.0 * 4 / 0.08),
            "vision_all": 3.0,  # as long as it should be
            "vision_focus": 0.6,
        },
        rel=1e-12,
    )


@pytest.mark.parametrize("length", [0.0, math.nan, math.inf])
def test_a_term_without_a_usable_gradient_keeps_its_weight(length: float) -> None:
    norms = dict.fromkeys(TERMS, 1.0)
    found = balanced_weights(norms | {"attention": length}, BASE, BASE)
    assert found["attention"] == BASE["attention"]
    assert found["divergence"] != BASE["divergence"]
    assert balanced_weights(norms | {"ce": length}, BASE, BASE) == pytest.approx(BASE)


def test_a_term_that_is_off_stays_off_and_none_has_a_weight_without_limit() -> None:
    base = {**BASE, "divergence": 0.0, "vision_all": 0.0, "vision_focus": 0.0}
    norms = dict.fromkeys(TERMS, 1.0) | {"attention": 1e-30}
    found = balanced_weights(norms, base, base)
    assert found == {**base, "attention": LARGEST}
    learned = LearnedWeights(base)
    for _ in range(2000):
        learned.learn(dict.fromkeys(TERMS, 1e-30))
    assert learned.weights == pytest.approx({**base, "attention": LARGEST})
    assert set(learned.state()) == {"attention"}


def test_learned_weights_are_those_of_adam_on_the_objective_in_float64() -> None:
    learned = LearnedWeights(BASE)
    terms = {"divergence": ("divergence",), "attention": ("attention",), "vision_all": TERMS[3:]}
    s, m, v, steps = (dict.fromkeys(terms, 0.0) for _ in range(4))
    for step in range(1, 41):
        values = means(step)
        learned.learn(values)
        for term, parts in terms.items():
            configured = sum(BASE[part] * values[part] for part in parts)
            if configured == 0:  # nothing to learn from
                continue
            log_variance = torch.tensor(s[term], dtype=torch.float64, requires_grad=True)
            objective = torch.exp(-log_variance) * configured + log_variance / 2
            slope = torch.autograd.grad(objective, log_variance)[0].item()
            steps[term] += 1
            m[term] = 0.9 * m[term] + 0.1 * slope
            v[term] = 0.999 * v[term] + 0.001 * slope**2
            mean, square = m[term] / (1 - 0.9 ** steps[term]), v[term] / (1 - 0.999 ** steps[term])
            s[term] -= LEARNING_RATE * mean / (math.sqrt(square) + 1e-8)
    expected = {part: BASE[part] * math.exp(-s[term]) for term, parts in terms.items() for part in parts} | {
        "ce": 1.0
    }
    assert learned.weights == pytest.approx(expected, rel=1e-12)
    assert steps == {"divergence": 40, "attention": 27, "vision_all": 27}


def test_a_learned_weight_comes_to_rest_where_its_term_adds_a_half() -> None:
    learned = LearnedWeights(BASE)
    constant = {"ce": 5.0, "divergence": 4.0, "attention": 1e-3, "vision_all": 0.1, "vision_focus": 0.2}
    for _ in range(3000):
        learned.learn(constant)
    weighted = {term: learned.weights[term] * value for term, value in constant.items()}
    assert weighted["divergence"] == pytest.approx(0.5, rel=1e-3)
    assert weighted["attention"] == pytest.approx(0.5, rel=1e-3)
    assert weighted["vision_all"] + weighted["vision_focus"] == pytest.approx(0.5, rel=1e-3)
    assert learned.weights["vision_focus"] == pytest.approx(0.2 * learned.weights["vision_all"])


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_a_step_without_a_usable_mean_leaves_the_weight_as_it_is(value: float) -> None:
    learned = LearnedWeights(BASE)
    learned.learn(dict.fromkeys(TERMS, 3.0))
    before = learned.weights
    learned.learn(dict.fromkeys(TERMS, 3.0) | {"attention": value})
    assert learned.weights["attention"] == before["attention"]
    assert all(learned.weights[term] < before[term] for term in ("divergence", "vision_all"))


def test_a_state_that_went_through_json_learns_on_bit_by_bit() -> None:
    whole, first = LearnedWeights(BASE), LearnedWeights(BASE)
    assert whole.weights == pytest.approx(BASE, rel=1e-15)
    for step in range(1, 6):
        whole.learn(means(step))
        first.learn(means(step))
    again = LearnedWeights(BASE)
    again.load_state(json.loads(json.dumps(first.state())))
    assert again.weights == whole.weights
    for step in range(6, 12):
        whole.learn(means(step))
        again.learn(means(step))
    assert again.state() == whole.state()
    assert again.weights == whole.weights
