"""Evaluations on held-out data at the edges of steps, on real ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkd.checkpoint.rank_state import seed_rank
from alignkd.distributed.ranks import Ranks
from alignkd.engine import evaluation, trainer
from alignkd.engine.held_out import held_out_losses
from alignkd.engine.setup import prepare
from alignkd.engine.signals import StopRequest
from alignkd.engine.step_clock import StepClock
from alignkd.evaluate.options import EvalOptions, named_models
from alignkd.evaluate.program import answer_all, score_all
from alignkd.run_folder.best import Best, best_checkpoint
from alignkd.run_folder.checkpoints import committed_steps, read_manifest, step_folder
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.progress import Progress
from tests import tiny
from tests.engine.test_training_run import same_but_for_times, train_run
from tests.ranks import RankPool

TERMS = ("loss", "ce", "reverse_kl", "attention", "vision_all", "vision_focus", "vision")


def held_out(data: Path, every: int, image_folder: Path = tiny.FOLDER, **more: Any) -> dict[str, Any]:
    sources = [
        {"file": str(data / f"{template}.json"), "template": template, "image_folder": str(image_folder)}
        for template in ("v1", "plain")
    ]
    given = {"every": every, "sources": sources, **more}
    return {f"evaluation__{name}": value for name, value in given.items()}


def evaluated_steps(run: Path) -> list[int]:
    return [row["step"] for row in tiny.metrics_rows(run) if "evaluation_loss" in row]


def train_seeded(ranks: Ranks, run: str, stop_after: int | None = None) -> int | str:
    """The processes of the pool have drawn random numbers before."""
    seed_rank(1, 0, ranks.rank)
    return train_run(ranks, run, stop_after)


def write_questions(data: Path, labels: Sequence[str] = ()) -> None:
    """Seven for the task `sample`, on no, one and two images; ``labels`` are the answers to the first."""
    images = ["image_0.png"], [], ["image_1.png", "image_0.png"]
    records = []
    for number in range(7):
        shown = images[number % 3]
        label = labels[number] if number < len(labels) else "none"
        turns = [("human", "<image>" * len(shown) + f"What is number {number}?"), ("gpt", label)]
        conversation = [{"from": speaker, "value": text} for speaker, text in turns]
        records.append({"id": f"q{number}", "image": shown, "conversations": conversation})
    data.mkdir(exist_ok=True)
    (data / "test.json").write_text(json.dumps(records))
    (data / "images").exists() or (data / "images").symlink_to(tiny.FOLDER)


def answers_of_the_export(run: Path, data: Path, precision: str) -> tuple[list[str], float]:
    """Of `alignkd eval` to the first five questions, and their score."""
    out = run.with_name(f"{run.name}-eval")
    options = EvalOptions(
        named_models([str(run / "student")]),
        "sample",
        str(data),
        str(out),
        limit=5,
        batch_size=3,
        precision=precision,
    )
    answer_all(options, None)
    (file,) = out.rglob("*.jsonl")
    (scores,) = score_all(options).values()
    return texts_of(file), scores[0].score.value


def texts_of(answers: Path) -> list[str]:
    return [json.loads(line)["text"] for line in answers.read_text().splitlines()]


@pytest.mark.parametrize(
    ("stage", "precision", "looks", "saved", "evaluated", "answered"),
    [
        (0, "fp32", 3, [2], [4], [4]),  # told to stop within the loss terms after step 2
        (2, "fp32", 8, [3, 2], [2, 4], [2, 4]),  # told to stop before step 4
        (3, "bf16", 6, [2], [2, 4], [4]),  # told to stop while the student answers after step 2
    ],
)
def test_evaluations_with_a_stop_and_a_resume_change_no_bit_of_the_training(
    two_ranks: RankPool,
    tmp_path: Path,
    stage: int,
    precision: str,
    looks: int,
    saved: list[int],
    evaluated: list[int],
    answered: list[int],
) -> None:
    """And the accuracy is that of the exported student: three of five answers are given as the right ones."""
    changes = {"student__zero_stage": stage, "training__precision": precision}
    plain = tiny.write_run(tmp_path / "plain", 2, **changes)
    assert two_ranks.run(train_seeded, str(plain)) == [0, 0]
    data = tmp_path / "data"
    write_questions(data)
    expected, _ = answers_of_the_export(plain, data, precision)
    assert all(expected)
    write_questions(data, expected[:3])
    run = tmp_path / "evaluated"
    tiny.copy_untrained(plain, run)
    task = {"task": "sample", "task_data": str(data), "questions": 5}
    tiny.resize_run(run, 2, **held_out(plain, every=2, samples=10, **task))
    assert two_ranks.run(train_seeded, str(run), looks) == [85, 85]
    assert committed_steps(run) == saved
    assert two_ranks.run(train_seeded, str(run)) == [0, 0]
    same_but_for_times(run, plain)
    for rank in range(2):
        states = [(step_folder(one, 4) / f"random-{rank}.json").read_text() for one in (run, plain)]
        assert states[0] == states[1]
    assert evaluated_steps(run) == evaluated
    accuracies = {row["step"]: row.get("evaluation_accuracy") for row in tiny.metrics_rows(run)}
    assert [step for step, value in accuracies.items() if value is not None] == answered
    assert texts_of(RunPaths(run).answers) == expected
    assert accuracies[4] == answers_of_the_export(run, data, precision)[1] == pytest.approx(60.0)
    manifest = read_manifest(step_folder(run, 4))
    assert manifest["evaluation"]["accuracy"] == accuracies[4]
    assert manifest["evaluated_on"]["accuracy"]["asked"] == 5
    assert "evaluation_seconds" in tiny.metrics_rows(run)[1]
    best = best_checkpoint(run, "loss")
    assert best is not None
    assert best.value == min(row.get("evaluation_loss", math.inf) for row in tiny.metrics_rows(run))


def test_the_values_are_those_that_training_on_the_same_samples_would_find(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    """A step on all samples reports the loss before its update: that of the evaluation after the last one."""
    folder = tmp_path / "run"
    run = tiny.write_run(
        folder,
        2,
        training__global_batch_size=32,
        training__epochs=3,
        training__max_gradient_norm=0.0,
        checkpoint__every=100,
        **held_out(folder, every=1, best="ce"),
    )
    assert two_ranks.run(train_run, str(run)) == [0, 0]
    rows = tiny.metrics_rows(run)
    assert len(rows) == 3
    for before, after in pairwise(rows):
        for name in TERMS:
            assert before[f"evaluation_{name}"] == pytest.approx(after[name], rel=1e-5), name
        assert before["evaluation_loss"] != before["loss"]
    best = min(rows, key=lambda row: row["evaluation_ce"])
    assert best_checkpoint(run, "ce") == Best(best["step"], best["evaluation_ce"], "ce")


def train_with_scripted_values(ranks: Ranks, run: str, stop_after: int | None = None) -> int | str:
    """Each evaluation takes an hour, by a clock that nothing else moves."""
    script = {1: 3.0, 2: 1.0, 3: 2.0, 4: math.nan}
    now = [0.0]

    def scripted(state: Any, _loader: Any, _stop: Any, alive: Any) -> dict[str, float]:
        alive(0)
        now[0] += 3600
        return {"loss": script[state.engine.global_steps], "ce": 0.0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "held_out_losses", scripted)
        patch.setattr(trainer, "StepClock", lambda: StepClock(lambda: now[0]))
        return train_run(ranks, run, stop_after)


def test_the_best_checkpoint_is_saved_between_saves_and_outlives_newer_ones_and_a_resume(
    one_rank: RankPool, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    changes = {"checkpoint__every": 100, "checkpoint__keep_last": 2}
    run = tiny.write_run(folder, 1, **changes, **held_out(folder, every=1))
    assert one_rank.run(train_with_scripted_values, str(run), 2) == [85]
    assert committed_steps(run) == [2, 1]
    assert one_rank.run(train_with_scripted_values, str(run)) == [0]
    assert committed_steps(run) == [4, 2]
    assert best_checkpoint(run, "loss") == Best(2, 1.0, "loss")
    manifest = read_manifest(step_folder(run, 2))
    assert manifest["evaluation"] == {"loss": 1.0, "ce": 0.0}
    assert manifest["evaluated_on"]["samples"] == 32
    assert manifest["evaluated_on"]["data"] == manifest["data"]  # here they are the same
    assert manifest["evaluated_on"]["loss"]["teacher"] == manifest["teacher"]
    rows = tiny.metrics_rows(run)
    assert [row["evaluation_loss"] for row in rows] == [3.0, 1.0, 2.0, None]
    assert [row["step_seconds"] for row in rows] == [0.0] * 4  # an evaluation is no part of a step


def evaluate_with_random_draws(ranks: Ranks, run: str) -> tuple[bool, bool, set[tuple[bool, bool]]]:
    """Are all modes and random states as before? And (training, with gradients) of each forward between."""
    engine_state = prepare(Path(run), ranks, Progress(Path(run), writes=ranks.is_first))
    engine, seen = engine_state.engine, set()

    def draw(module: torch.nn.Module, *_: object) -> None:
        torch.rand(1)  # as dropout would
        seen.add((module.training, torch.is_grad_enabled()))

    engine.module.register_forward_hook(draw)
    engine.module.student.head.eval()  # a mode of its own
    modes, random = [module.training for module in engine.modules()], torch.get_rng_state()
    assert engine_state.held_out is not None
    held_out_losses(engine_state, engine_state.held_out, StopRequest(), lambda _: None)
    after = [module.training for module in engine.modules()]
    engine_state.loader.close()
    return after == modes and True in modes, torch.get_rng_state().equal(random), seen


def test_modules_are_in_their_modes_and_random_states_as_before_after_an_evaluation(
    one_rank: RankPool, tmp_path: Path
) -> None:
    run = tiny.write_run(tmp_path / "run", 1, **held_out(tmp_path / "run", every=1, samples=4))
    assert one_rank.run(evaluate_with_random_draws, str(run)) == [(True, True, {(False, False)})]


def test_held_out_samples_that_cannot_be_read_cost_an_evaluation_and_not_the_run(
    one_rank: RankPool, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    (tmp_path / "nothing").mkdir()
    changes = held_out(folder, every=1, image_folder=tmp_path / "nothing")
    run = tiny.write_run(folder, 1, training__max_steps=2, **changes)
    assert one_rank.run(train_run, str(run)) == [0]
    rows = tiny.metrics_rows(run)
    assert [row["step"] for row in rows] == [1, 2]
    assert evaluated_steps(run) == []
    assert all(row["evaluation_seconds"] > 0 for row in rows)
    assert json.loads((run / "result.json").read_text())["status"] == "done"
