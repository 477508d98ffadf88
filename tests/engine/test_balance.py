"""The weights of the terms while a run trains, on real ranks: they follow, agree and are resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from alignkd.config.schema import DistillationSection, DistillationWeights
from alignkd.distributed.ranks import Ranks
from alignkd.engine import trainer
from alignkd.engine.balance import BALANCE, Balance, weights_in_use
from alignkd.engine.optimizer_step import run_optimizer_step, term_weights
from alignkd.engine.setup import prepare
from alignkd.engine.signals import StopRequest
from alignkd.losses.balance import LearnedWeights, balanced_weights
from alignkd.losses.total import TERMS
from alignkd.run_folder.checkpoints import committed_steps, read_manifest, step_folder
from alignkd.run_folder.metrics import WEIGHT_OF, weights_of_row
from alignkd.run_folder.progress import Progress
from tests import tiny
from tests.engine.test_training_run import StopAfter, same_but_for_times
from tests.ranks import RankPool

SHOWN = {"reverse_kl": "divergence"}
WEIGHTS = {"attention": 5.0, "vision": 2.0, "logits": 0.5}


class Trained(NamedTuple):
    code: int
    weights: dict[str, float]  # at the end
    minimised: list[dict[str, float]]  # weights of the loss of each step


def train(ranks: Ranks, run: str, stop_after: int | None = None) -> Trained:
    stop = StopRequest() if stop_after is None else StopAfter(stop_after, "usr1")
    progress = Progress(Path(run), writes=ranks.is_first)
    found = trainer.Trainer(prepare(Path(run), ranks, progress), stop, progress)
    minimised = []

    def recorded(*arguments: Any) -> Any:
        minimised.append(arguments[-1])
        return run_optimizer_step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "run_optimizer_step", recorded)
        return Trained(found.train(), found.balance.weights, minimised)


def by_term(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    return {SHOWN.get(name, name): row[prefix + name] for name in ("ce", "reverse_kl", *TERMS[2:])}


def weights_of(row: dict[str, Any]) -> dict[str, float]:
    return {"ce": 1.0} | {SHOWN.get(name, name): value for name, value in weights_of_row(row).items()}


def check_gradient(rows: list[dict[str, Any]], base: dict[str, float]) -> None:
    """Measured before steps 2 and 4."""
    assert [f"gradient_norm_of_{term}" in rows[0] for term in ("ce", "attention")] == [False, False]
    assert weights_of(rows[0]) == base
    assert weights_of(rows[2]) == weights_of(rows[1])
    for row, before in ((rows[1], base), (rows[3], weights_of(rows[2]))):
        norms = by_term(row, "gradient_norm_of_")
        assert weights_of(row) == balanced_weights(norms, before, base)
    assert weights_of(rows[1])["attention"] > 2 * base["attention"]


def check_learned(rows: list[dict[str, Any]], base: dict[str, float]) -> None:
    """The weights of a step follow the means up to the last step but one."""
    learned = LearnedWeights(base)
    assert weights_of(rows[0]) == weights_of(rows[1]) == base
    for row, late in ((rows[2], rows[0]), (rows[3], rows[1])):
        learned.learn(by_term(late))
        assert weights_of(row) == learned.weights
    assert weights_of(rows[3])["attention"] > weights_of(rows[2])["attention"] > base["attention"]


@pytest.mark.parametrize(
    ("stage", "precision", "kind"),
    [(0, "fp32", "learned"), (3, "bf16", "learned"), (1, "bf16", "gradient"), (2, "fp32", "gradient")],
)
def test_weights_follow_by_the_rule_on_all_ranks_and_a_resume_has_the_same_bits(
    two_ranks: RankPool, tmp_path: Path, stage: int, precision: str, kind: str
) -> None:
    changes = {"student__zero_stage": stage, "training__precision": precision, "teacher__placement": "zero3"}
    changes |= {"distillation__balance": kind, "distillation__balance_every": 2}
    whole = tiny.write_run(tmp_path / "whole", 2, distillation__weights=WEIGHTS, **changes)
    first, second = two_ranks.run(train, str(whole))
    assert first.code == 0
    assert first == second  # each rank has samples of its own
    rows = tiny.metrics_rows(whole)
    assert len(rows) == 4
    base = term_weights(DistillationSection(weights=DistillationWeights(**WEIGHTS)))
    (check_learned if kind == "learned" else check_gradient)(rows, base)
    for row, minimised in zip(rows, first.minimised, strict=True):
        assert weights_of(row) == minimised
        terms = by_term(row)
        assert row["loss"] == sum(base[term] * terms[term] for term in TERMS)  # comparable

    stopped = tmp_path / "stopped"
    tiny.copy_untrained(whole, stopped)
    # Step 3 is saved, which the other run does not save.
    assert [rank.code for rank in two_ranks.run(train, str(stopped), 3)] == [85, 85]
    assert committed_steps(stopped) == [3, 2]
    resumed = two_ranks.run(train, str(stopped))
    assert resumed == [first._replace(minimised=first.minimised[3:])] * 2
    same_but_for_times(stopped, whole)
    saved = [read_manifest(step_folder(run, 4))[BALANCE] for run in (stopped, whole)]
    assert saved[0] == saved[1]
    assert saved[0]["weights"] == first.weights


def section(kind: str, **changes: Any) -> DistillationSection:
    return DistillationSection.model_validate({"balance": kind, "balance_every": 3, **changes})


OTHERS = ("ce", "divergence", "vision_all", "vision_focus")
ROW = {"ce": 1.0, "js": 2.0, "attention": 1e-4, "vision_all": 0.1, "vision_focus": 0.2}
FULL_ROW = {"reverse_kl": 2.0, **ROW}


def move(balance: Balance) -> None:
    """By one measurement, or by one row; whichever it follows."""
    if balance.is_due(3):
        balance.follow(
            {"ce": 1.0, "divergence": 2.0, "attention": 1e-4, "vision_all": 0.1, "vision_focus": 0.2}
        )
    balance.learn(FULL_ROW)


def test_fixed_weights_leave_no_trace() -> None:
    for distillation in (section("fixed"), section("learned", enabled=False)):
        balance = Balance(distillation, {})
        balance.learn(FULL_ROW)
        assert balance.weights == term_weights(distillation)
        assert balance.columns() == balance.facts(ROW) == {}
        assert not any(balance.is_due(step) for step in range(1, 7))


def test_only_gradients_are_measured_and_every_so_many_steps() -> None:
    assert [step for step in range(1, 8) if Balance(section("gradient"), {}).is_due(step)] == [3, 6]
    assert not any(Balance(section("learned"), {}).is_due(step) for step in range(1, 8))


def test_columns_are_the_terms_that_have_a_weight_by_their_names_in_rows() -> None:
    balance = Balance(section("gradient", divergence="js", weights={"attention": 0.0}), {})
    assert balance.columns() == {
        WEIGHT_OF + "js": 1.0,
        WEIGHT_OF + "vision_all": 1.0,
        WEIGHT_OF + "vision_focus": 0.1,
    }


def test_the_first_row_of_a_process_is_that_of_the_checkpoint() -> None:
    whole = Balance(section("learned", divergence="js"), {})
    whole.learn(None)
    assert whole.weights == term_weights(section("learned"))
    whole.learn(ROW)
    again = Balance(section("learned", divergence="js"), whole.facts({**ROW, "js": 5.0}))
    assert again.weights == whole.weights
    whole.learn({**ROW, "js": 5.0})
    again.learn(None)
    assert again.facts(ROW) == whole.facts(ROW)
    again.learn(None)  # known once only
    assert again.weights == whole.weights


def test_weights_of_another_balance_are_not_taken_over() -> None:
    learned = Balance(section("learned", divergence="js"), {})
    learned.learn(ROW)
    manifest = learned.facts(ROW)
    assert weights_in_use(section("learned"), manifest) == learned.weights
    for other in (section("gradient"), section("fixed"), section("learned", enabled=False)):
        assert weights_in_use(other, manifest) == term_weights(other) != learned.weights
    assert weights_in_use(section("learned"), {}) == term_weights(section("learned"))


@pytest.mark.parametrize("kind", ["gradient", "learned"])
@pytest.mark.parametrize(("before", "after"), [(0.0, 1.0), (1.0, 0.0), (1.0, 100.0)])
def test_a_term_whose_configured_weight_changed_begins_anew_before_the_first_step(
    kind: str, before: float, after: float
) -> None:
    whole = Balance(section(kind, weights={"attention": before}), {})
    for _ in range(3):
        move(whole)
    manifest = json.loads(json.dumps(whole.facts(FULL_ROW)))
    changed = section(kind, weights={"attention": after})
    again = Balance(changed, manifest)
    assert again.weights == {**whole.weights, "attention": after} == weights_in_use(changed, manifest)
    assert (WEIGHT_OF + "attention" in again.columns()) == (after > 0)
    fresh = Balance(changed, {})
    for balance in (whole, again, fresh):
        move(balance)
    assert again.weights["attention"] == fresh.weights["attention"]
    assert (again.weights["attention"] != after) == (after > 0)
    assert [again.weights[term] for term in OTHERS] == [whole.weights[term] for term in OTHERS]


@pytest.mark.parametrize("kind", ["gradient", "learned"])
def test_another_lambda_changes_the_share_of_the_focus_alone(kind: str) -> None:
    whole = Balance(section(kind), {})
    assert Balance(section(kind), whole.facts(FULL_ROW)).weights == whole.weights  # before any measurement
    move(whole)
    assert Balance(section(kind), whole.facts(FULL_ROW)).weights == whole.weights
    again = Balance(section(kind, vision_focus_weight=0.3), whole.facts(FULL_ROW))
    focus = pytest.approx(0.3 * whole.weights["vision_all"])
    assert again.weights == {**whole.weights, "vision_focus": focus}
    assert whole.weights["vision_all"] != 1.0
