"""The questions of a task at the edge of a step: in this process with a model that only counts, and on real
ranks with a student of another family that ZeRO-3 shards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch.nn import functional

from alignkd.checkpoint.save import CheckpointSaver
from alignkd.config.schema import EvaluationSection
from alignkd.data.records import Turn
from alignkd.distributed.ranks import Ranks
from alignkd.engine.accuracy import TaskAtEdges, task_accuracy
from alignkd.engine.evaluation import Evaluations
from alignkd.engine.signals import StopRequest
from alignkd.engine.state import TrainingState
from alignkd.errors import CheckpointError, TakenOverError, UserError
from alignkd.evaluate.answering_model import AnsweringModel, Request
from alignkd.evaluate.asked_task import AskedTask, asked_task, fingerprint_of
from alignkd.evaluate.options import EvalOptions, named_models
from alignkd.evaluate.program import answer_all
from alignkd.evaluate.tasks.pictures import PictureFile
from alignkd.evaluate.tasks.registry import task_named
from alignkd.models.families.interface import VisionLanguageModel
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.writer_lock import taken_over
from tests import tiny, vlm
from tests.engine.test_training_run import train_run
from tests.ranks import RankPool


def write_questions(data: Path, labels: Sequence[str]) -> None:
    """For the task `sample`, each about a picture of its own."""
    (data / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for number, label in enumerate(labels):
        Image.new("RGB", (40, 30), (60 * number, 0, 0)).save(data / "images" / f"{number}.png")
        turns = [("human", f"<image>What is {number}?"), ("gpt", label)]
        conversation = [{"from": speaker, "value": text} for speaker, text in turns]
        records.append({"id": f"q{number}", "image": f"{number}.png", "conversations": conversation})
    (data / "test.json").write_text(json.dumps(records))


def asked_of(data: Path, questions: int = 256) -> AskedTask:
    return asked_task(EvaluationSection(task="sample", task_data=str(data), questions=questions))


class Counting(AnsweringModel):
    """Answers with the number of requests so far; draws a random number for each, as dropout would."""

    precision = "fp32"
    in_batches = False

    def __init__(self) -> None:
        self.calls = 0
        self.linear: Any = None

    def answers(self, requests: Sequence[Request], *_: object) -> list[str]:
        self.linear = functional.linear
        self.calls += 1
        torch.rand(1)
        return [str(self.calls)]

    def _prepared(self, image: Image.Image, *_: object) -> Image.Image:
        return image

    def padding_for(self, *_: object) -> Any:
        return "processor"

    def fingerprint(self) -> str:
        raise NotImplementedError

    device = torch.device("cpu")


@pytest.fixture
def alone() -> SimpleNamespace:
    def raising(problem: Exception) -> Exception:
        return problem

    return SimpleNamespace(
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        sum_on_host=lambda values: values,
        gather_objects=lambda value: [value],
        shared_error=raising,
        run_on_rank0=lambda work: work(),
        broadcast_object=lambda value: value,
    )


def accuracy_of(
    run: Path, asked: AskedTask, model: Counting, ranks: Any, stop: StopRequest, looks: list[int]
) -> dict[str, float] | None:
    task, student = TaskAtEdges(asked, lambda _: model), cast(VisionLanguageModel, SimpleNamespace())
    return task_accuracy(run, 7, student, task, ranks, stop, looks.append, lambda: None)


def test_the_first_questions_are_scored_and_their_answers_kept(
    alone: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_questions(tmp_path / "data", ["1", "no", "3", "4"])
    model, looks, random = Counting(), list[int](), torch.get_rng_state()
    monkeypatch.setattr(functional, "linear", deepspeeds := lambda *_: None)
    found = accuracy_of(tmp_path, asked_of(tmp_path / "data", 3), model, alone, StopRequest(), looks)
    assert found is not None
    assert found["accuracy"] == pytest.approx(200 / 3)
    assert found["accuracy_standard_error"] == pytest.approx(100 / 3)  # s / sqrt(n) of 1, 0, 1
    assert torch.get_rng_state().equal(random)
    assert (model.linear, functional.linear) == (torch._C._nn.linear, deepspeeds)
    assert looks == [0, 1, 2, 3]  # the watch for hangs sees each
    rows = [json.loads(line) for line in RunPaths(tmp_path).answers.read_text().splitlines()]
    assert [(row["question_id"], row["text"]) for row in rows] == [("q0", "1"), ("q1", "2"), ("q2", "3")]
    assert {row["model_id"] for row in rows} == {f"{tmp_path.name}, step 7"}
    assert rows[0]["metadata"] == {"precision": "fp32", "batch_size": 1, "image_padding": "processor"}


def test_a_process_that_has_lost_the_run_leaves_the_answers_to_its_successor(
    alone: SimpleNamespace, tmp_path: Path
) -> None:
    write_questions(tmp_path / "data", ["1", "2"])
    RunPaths(tmp_path).answers.write_text("theirs")
    model = Counting()

    def lost() -> None:
        assert model.calls == 2  # while the questions were answered
        raise taken_over(tmp_path)

    state = SimpleNamespace(
        run=tmp_path,
        config=SimpleNamespace(evaluation=EvaluationSection()),
        held_out=None,
        task=TaskAtEdges(asked_of(tmp_path / "data"), lambda _: model),
        ranks=alone,
        engine=SimpleNamespace(module=SimpleNamespace(student=SimpleNamespace())),
    )
    saver = SimpleNamespace(totals=SimpleNamespace(failed=0), require_writer=lost)
    evaluations = Evaluations(cast(TrainingState, state), StopRequest(), lambda *_, **__: None)
    with pytest.raises(TakenOverError):
        evaluations.evaluate(7, cast(CheckpointSaver, saver))
    assert RunPaths(tmp_path).answers.read_text() == "theirs"


def test_a_stop_ends_the_questions_after_the_one_under_way(alone: SimpleNamespace, tmp_path: Path) -> None:
    write_questions(tmp_path / "data", ["1", "2", "3"])
    model, stop = Counting(), StopRequest()

    class Looks(list[int]):
        def append(self, number: int) -> None:
            super().append(number)
            stop.term = number == 2

    looks = Looks()
    assert accuracy_of(tmp_path, asked_of(tmp_path / "data"), model, alone, stop, looks) is None
    assert (model.calls, looks) == (2, [0, 1, 2])
    assert not RunPaths(tmp_path).answers.exists()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("images/1.png", "images/1.png: the picture is missing"),
        ("test.json", "a file or folder is missing"),
        ("memory", "out of memory while the student answered"),
        ("processor", "the student cannot answer: ValueError: absolute aspect ratio must be smaller"),
    ],
)
def test_what_cannot_be_answered_or_scored_costs_the_accuracy_and_not_the_run(
    alone: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str, message: str
) -> None:
    def failing(*_: object) -> list[str]:
        if broken == "memory":
            raise torch.OutOfMemoryError
        raise ValueError("absolute aspect ratio must be smaller than 200")

    data, model = tmp_path / "data", Counting()
    write_questions(data, ["1", "2"])
    asked = asked_of(data)
    if broken in ("memory", "processor"):
        model.answers = failing  # type: ignore[method-assign]
    else:
        (data / broken).unlink()
    assert accuracy_of(tmp_path, asked, model, alone, StopRequest(), []) is None
    assert "warning: no accuracy at this step" in caplog.text
    assert message in caplog.text


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (torch.OutOfMemoryError(), "out of memory while the student answered"),
        (RuntimeError("no room"), "the student cannot answer: RuntimeError: no room"),
        (CheckpointError("2 tensors do not fit"), "2 tensors do not fit"),
    ],
)
def test_a_student_that_cannot_be_built_costs_the_accuracy_and_not_the_run(
    alone: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture, raised: Exception, message: str
) -> None:
    def cannot(_: object) -> AnsweringModel:
        raise raised

    write_questions(tmp_path, ["1"])
    task = TaskAtEdges(asked_of(tmp_path), cannot)
    student, ranks = cast(VisionLanguageModel, SimpleNamespace()), cast(Ranks, alone)
    found = task_accuracy(tmp_path, 7, student, task, ranks, StopRequest(), [].append, lambda: None)
    assert found is None
    assert "warning: no accuracy at this step" in caplog.text
    assert message in caplog.text


def test_a_run_that_has_been_told_to_stop_builds_no_student(
    alone: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_questions(tmp_path, ["1"])
    task, stop = TaskAtEdges(asked_of(tmp_path), lambda _: pytest.fail("built")), StopRequest()
    stop.usr1 = True
    caplog.set_level("INFO")
    student, ranks = cast(VisionLanguageModel, SimpleNamespace()), cast(Ranks, alone)
    assert task_accuracy(tmp_path, 7, student, task, ranks, stop, [].append, lambda: None) is None
    assert "the questions are given up: the run has been told to stop" in caplog.text


def test_an_accuracy_is_compared_with_those_on_the_same_questions_pictures_and_labels_wherever_they_lie(
    tmp_path: Path,
) -> None:
    for name, label in (("a", "1"), ("b", "1"), ("c", "2")):
        write_questions(tmp_path / name, [label])
    asked = [asked_of(tmp_path / name) for name in "abc"]
    assert asked[0].fingerprint == asked[1].fingerprint != asked[2].fingerprint
    (question,) = asked[0].questions
    changed = [
        replace(question, pictures=(PictureFile(tmp_path, "1.png"),)),
        replace(question, earlier=(Turn("human", "before"),)),
    ]
    layout = task_named("sample").layout
    found = {fingerprint_of([one], layout, asked[0].data) for one in (question, *changed)}
    assert len(found) == 3
    assert asked[0].fingerprint in found


def test_questions_of_an_unknown_task_and_without_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="task 'x' is unknown"):
        asked_task(EvaluationSection(task="x", task_data=str(tmp_path)))
    with pytest.raises(UserError, match="2 files or folders are missing"):
        asked_of(tmp_path)


def test_ranks_without_a_question_wait_for_the_others_and_the_answers_are_those_of_the_export(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    """A student of another family under ZeRO stage 3; the second rank has one of the three questions."""
    data = tmp_path / "data"
    write_questions(data, ["x", "y", "z"])
    task = {"every": 2, "task": "sample", "task_data": str(data), "best": "accuracy"}
    changes = {f"evaluation__{name}": value for name, value in task.items()}
    run = vlm.write_run(
        tmp_path / "run", 2, "qwen2_5_vl", student__zero_stage=3, training__max_steps=2, **changes
    )
    assert two_ranks.run(train_run, str(run)) == [0, 0]
    out = tmp_path / "eval"
    answer_all(EvalOptions(named_models([str(run / "student")]), "sample", str(data), str(out)), None)
    (file,) = out.rglob("*.jsonl")
    texts = [
        [json.loads(line)["text"] for line in path.read_text().splitlines()]
        for path in (file, RunPaths(run).answers)
    ]
    assert texts[0] == texts[1]
    assert any(texts[0])
    assert [row.get("evaluation_accuracy") for row in tiny.metrics_rows(run)] == [None, 0.0]
    assert not RunPaths(run).held_out_index.exists()


def test_a_picture_that_the_processor_of_one_rank_does_not_take_costs_all_ranks_the_accuracy_and_not_the_run(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    """The second rank gets the second question; Qwen's processor raises a ValueError for its picture."""
    data = tmp_path / "data"
    write_questions(data, ["x", "y"])
    Image.new("RGB", (2100, 10)).save(data / "images" / "1.png")
    task = {"every": 1, "task": "sample", "task_data": str(data), "best": "accuracy"}
    changes = {f"evaluation__{name}": value for name, value in task.items()}
    run = vlm.write_run(tmp_path / "run", 2, "qwen2_5_vl", training__max_steps=2, **changes)
    assert two_ranks.run(train_run, str(run)) == [0, 0]
    rows = tiny.metrics_rows(run)
    assert [row["step"] for row in rows] == [1, 2]
    assert all("evaluation_seconds" in row and "evaluation_accuracy" not in row for row in rows)
    assert "rank 1: the student cannot answer: ValueError: absolute aspect ratio" in two_ranks.log(0)
    assert not RunPaths(run).answers.exists()
