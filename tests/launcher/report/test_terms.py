"""The share of each term, by weights worked out by hand."""

from __future__ import annotations

import pytest

from launcher.report.columns import read_columns
from launcher.report.terms import terms_of, weights_of

ROW = {"ce": 1.0, "reverse_kl": 2.0, "attention": 0.5, "vision_all": 3.0, "vision_focus": 10.0}


def test_weights_are_those_of_the_configuration() -> None:
    section = {
        "enabled": True,
        "divergence": "js",
        "vision_focus_weight": 0.2,
        "weights": {"attention": 0.0, "vision": 2.0, "logits": 3.0},
    }
    assert weights_of({"distillation": section}) == {
        "ce": 1.0,
        "js": 3.0,
        "vision_all": 2.0,
        "vision_focus": 0.4,
    }


@pytest.mark.parametrize("config", [{}, {"distillation": {"enabled": False}}, {"distillation": 3}])
def test_without_a_teacher_the_label_term_is_alone(config) -> None:
    columns = read_columns([{"step": 1, **ROW}])
    assert [(term.name, term.last_share) for term in terms_of(columns, config)] == [("ce", 1.0)]


def test_shares_are_weight_times_value_and_add_up_to_one() -> None:
    config = {"distillation": {"weights": {"attention": 4.0, "vision": 1.0, "logits": 0.5}}}
    rows = [{"step": step, **(ROW if step <= 10 else {**ROW, "ce": 0.0})} for step in range(1, 21)]
    terms = {term.name: term for term in terms_of(read_columns(rows), config)}
    assert list(terms) == ["ce", "reverse_kl", "attention", "vision_all", "vision_focus"]
    # 1 x 1 + 0.5 x 2 + 4 x 0.5 + 1 x 3 + 0.1 x 10 = 8; later the first is 0.
    assert [term.first_share for term in terms.values()] == pytest.approx([1 / 8, 1 / 8, 2 / 8, 3 / 8, 1 / 8])
    assert [term.last_share for term in terms.values()] == pytest.approx([0, 1 / 7, 2 / 7, 3 / 7, 1 / 7])
    assert (terms["ce"].first, terms["ce"].last, terms["attention"].last_weight) == (1.0, 0.0, 4.0)


def test_weights_that_moved_are_those_in_use_and_so_are_the_shares() -> None:
    config = {"distillation": {"balance": "learned", "weights": {"vision": 0.0}}}
    moved = {"weight_of_reverse_kl": 2.0, "weight_of_attention": 10.0}
    rows = [{"step": step, **ROW, **(moved if step > 10 else {})} for step in range(1, 21)]
    columns = read_columns([{"weight_of_reverse_kl": 1.0, "weight_of_attention": 1.0, **row} for row in rows])
    terms = {term.name: term for term in terms_of(columns, config)}
    assert [(term.first_weight, term.last_weight) for term in terms.values()] == [(1, 1), (1, 2), (1, 10)]
    # 1 + 2 + 0.5 = 3.5 at first, and 1 + 2 x 2 + 10 x 0.5 = 10 at last.
    assert [term.first_share for term in terms.values()] == pytest.approx([1 / 3.5, 2 / 3.5, 0.5 / 3.5])
    assert [term.last_share for term in terms.values()] == pytest.approx([0.1, 0.4, 0.5])


def test_terms_that_are_all_zero_have_no_share() -> None:
    assert [term.first_share for term in terms_of(read_columns([{"step": 1, "ce": 0.0}]), {})] == [0.0]
    assert terms_of(read_columns([]), {}) == []
