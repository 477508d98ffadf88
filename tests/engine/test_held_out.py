"""Evaluations in this process, with an engine that counts samples instead of training a model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from alignkd.checkpoint.commit import SaveTotals
from alignkd.config.live_sections import LoggingSection
from alignkd.config.schema import Config, DataSection, DataSource, EvaluationSection, ModelSection
from alignkd.data.batch import Batch
from alignkd.data.held_out import HeldOut
from alignkd.engine import evaluation, term_norms
from alignkd.engine.accuracy import TaskAtEdges
from alignkd.engine.balance import Balance
from alignkd.engine.evaluation import Evaluations
from alignkd.engine.held_out import held_out_losses
from alignkd.engine.signals import StopRequest
from alignkd.engine.term_norms import TermNorms
from alignkd.evaluate.asked_task import AskedTask
from alignkd.losses.total import TERMS, ElementSizes
from alignkd.run_folder.checkpoints import MANIFEST, MARKER, step_folder
from tests import tiny

SIZES = ElementSizes(student_heads=1, student_width=1)


class Samples(torch.nn.Module):
    """The sum of each term is the number of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.module = SimpleNamespace(sizes=lambda: SIZES)

    def forward(self, batch: Batch, *_: object) -> SimpleNamespace:
        return SimpleNamespace(sums=torch.full((len(TERMS),), float(batch.counts.samples)))


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: None)
    return SimpleNamespace(
        device=torch.device("cpu"),
        world_size=1,
        sum_on_host=lambda values: values,
        run_on_rank0=lambda work: work(),
        broadcast_object=lambda value: value,
    )


def state_of(ranks: SimpleNamespace, run: Path, windows: Sequence[list[Batch]] = (), **evaluated: Any) -> Any:
    source = DataSource(file="held-out.json")
    config = Config(
        model=ModelSection(student="x"),
        data=DataSection(sources=[source]),
        evaluation=EvaluationSection(every=1, sources=[source], **evaluated),
        logging=LoggingSection(gradient_norms_every=2),
    )
    held_out = HeldOut(lambda: contextlib.nullcontext(windows), "data", 8)  # type: ignore[arg-type, return-value]
    identity = SimpleNamespace(teacher=None)
    return SimpleNamespace(
        config=config,
        ranks=ranks,
        engine=Samples(),
        teacher=None,
        held_out=held_out,
        task=None,
        identity=identity,
        run=run,
    )


def bad(count: int) -> Batch:
    batch = tiny.batch_of()
    return replace(batch, counts=replace(batch.counts, skipped=count))


def test_a_window_of_bad_samples_is_passed_over_and_only_all_bad_ones_cost_the_evaluation(
    one_rank: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    looked: list[int] = []
    good = tiny.batch_of("text", "text")

    def evaluate(*windows: list[Batch]) -> dict[str, float] | None:
        state = state_of(one_rank, tmp_path, windows)
        return held_out_losses(state, state.held_out, StopRequest(), looked.append)

    values = evaluate([bad(2)], [good])
    assert values is not None
    assert values["ce"] == 2 / good.counts.supervised
    assert looked == [0, 1]
    assert caplog.text == ""
    assert evaluate([bad(2)], [bad(1)]) is None
    assert "no evaluation at this step: all 3 held-out samples are bad" in caplog.text


def commit(run: Path, step: int, facts: dict[str, Any]) -> None:
    folder = step_folder(run, step)
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text(json.dumps({"step": step, "files": {}, **facts}))
    (folder / MARKER).touch()


class Saver:
    """A save in flight that :meth:`finish` commits or loses."""

    def __init__(self, run: Path) -> None:
        self.run, self.totals = run, SaveTotals()
        self.in_flight: tuple[int, dict[str, Any], bool] | None = None

    def require_writer(self) -> None:
        """It is."""

    def finish(self) -> None:
        if self.in_flight is not None:
            step, facts, works = self.in_flight
            self.in_flight = None
            if works:
                commit(self.run, step, facts)
            else:
                self.totals = self.totals.plus_failed()


def test_a_value_whose_save_failed_is_not_the_best_any_more(
    one_rank: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = {1: 5.0, 2: 1.0, 3: 3.0, 4: 4.0, 5: 2.0}
    works = {1: True, 2: False, 3: True, 4: True, 5: True}
    reports: list[tuple[str, int | None]] = []
    found = {}

    def scripted(_state: object, _held_out: object, _stop: object, alive: Any) -> dict[str, float]:
        alive(7)
        return {"loss": script[step], "ce": 0.0}

    monkeypatch.setattr(evaluation, "held_out_losses", scripted)
    state, saver = state_of(one_rank, tmp_path), Saver(tmp_path)

    def report(phase: str, done: int | None = None) -> None:
        reports.append((phase, done))

    held_out = Evaluations(state, StopRequest(), report)
    for step in script:
        held_out.evaluate(step, saver)  # type: ignore[arg-type]
        found[step] = held_out.best_step
        if found[step] == step:
            saver.finish()  # as a save does first
            saver.in_flight = (step, held_out.facts(step), works[step])
        if step == 2:
            saver.finish()  # at the edge of a step
    # The save of step 3 is in flight when that of step 2 is known to be lost.
    assert found == {1: 1, 2: 2, 3: 3, 4: 3, 5: 5}
    assert reports.count(("evaluating", 7)) == 5
    assert reports.count(("saving", None)) == 1
    saver.finish()
    assert Evaluations(state, StopRequest(), report).best_step == 5
    other = state_of(one_rank, tmp_path, best="ce")
    other.held_out = replace(other.held_out, samples=4)
    assert Evaluations(other, StopRequest(), report).best_step is None


def test_the_highest_accuracy_is_the_best_and_evaluations_need_no_held_out_data(
    one_rank: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script: dict[int, float | None] = {1: 50.0, 2: 75.0, 3: None, 4: 60.0, 5: 75.0, 6: 80.0}
    asked = AskedTask("sample", tmp_path, [], False, "questions")
    reports: list[tuple[str, int | None]] = []

    def scripted(run: Path, step: int, *_: object) -> dict[str, float] | None:
        assert run == tmp_path
        value = script[step]
        return None if value is None else {"accuracy": value, "accuracy_standard_error": 1.0}

    monkeypatch.setattr(evaluation, "task_accuracy", scripted)
    state, saver = state_of(one_rank, tmp_path, best="accuracy"), Saver(tmp_path)
    state.held_out, state.task = None, TaskAtEdges(asked, lambda _: pytest.fail("scripted"))
    state.engine.module.student = None
    evaluations = Evaluations(state, StopRequest(), lambda phase, done=None: reports.append((phase, done)))
    rows, found = {}, {}
    for step in script:
        rows[step] = evaluations.evaluate(step, saver)  # type: ignore[arg-type]
        found[step] = evaluations.best_step
        if found[step] == step:
            commit(tmp_path, step, evaluations.facts(step))
    assert found == {1: 1, 2: 2, 3: 2, 4: 2, 5: 2, 6: 6}
    assert rows[2]["evaluation_accuracy"] == 75.0
    assert rows[2]["evaluation_accuracy_standard_error"] == 1.0
    assert set(rows[3]) == {"evaluation_seconds"}
    assert evaluations.facts(3) == {}
    assert Evaluations(state, StopRequest(), lambda *_: None).best_step == 6
    state.task = TaskAtEdges(replace(asked, fingerprint="others"), lambda _: pytest.fail("scripted"))
    assert Evaluations(state, StopRequest(), lambda *_: None).best_step is None


def test_values_on_held_out_data_stay_comparable_when_the_balance_changes(
    one_rank: SimpleNamespace, tmp_path: Path
) -> None:
    """They have the configured weights."""
    states = [state_of(one_rank, tmp_path) for _ in range(3)]
    for state, changes in zip(states, ({}, {"balance": "learned"}, {"temperature": 2.0}), strict=True):
        section = state.config.distillation.model_copy(update=changes)
        state.config = state.config.model_copy(update={"distillation": section})
    first, balanced, other = (evaluation._evaluated_on(state)["loss"] for state in states)
    assert first == balanced != other
    # Earlier versions' checkpoints are compared too.
    assert not {"balance", "balance_every"} & set(first)


def test_a_sample_of_gradient_norms_takes_no_random_number_from_the_training(
    one_rank: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = []

    def with_dropout(*_: object) -> torch.Tensor:
        draws.append(torch.rand(len(TERMS), 2))
        return draws[-1]

    monkeypatch.setattr(term_norms, "term_gradient_norms", with_dropout)
    state = state_of(one_rank, tmp_path)
    before = torch.get_rng_state()
    columns = TermNorms(state, Balance(state.config.distillation, {})).columns(2, [tiny.batch_of("text")])
    assert columns["gradient_norm_of_ce"] == pytest.approx(float(draws[0][0].norm()))
    assert torch.get_rng_state().equal(before)
