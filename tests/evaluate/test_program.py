"""Whole evaluations of the fixture's student: asked, answered, killed, resumed, split over ranks, scored."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import alignkd
from alignkd.errors import UserError
from alignkd.evaluate import answering
from alignkd.evaluate.__main__ import main
from alignkd.evaluate.answering import answer_own_share, is_finished, merge_parts
from alignkd.evaluate.answering_model import AnsweringModel
from alignkd.evaluate.options import ModelChoice, OwnQuestions, write_options
from alignkd.evaluate.program import answer_all, score_all, work_of
from tests import tiny
from tests.evaluate.questions import QUESTIONS, options, write_questions

LONGEST = 8  # tokens; the official 128 would take the fixture's random weights all of them


@pytest.fixture(autouse=True)
def _short_answers_of_one_process(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr("alignkd.evaluate.tasks.own.SHORT_ANSWER_TOKENS", LONGEST)


@pytest.fixture(scope="module")
def model() -> AnsweringModel:
    torch.set_num_threads(1)
    return alignkd.load(tiny.STUDENT, precision="fp32")


@pytest.fixture(scope="module")
def texts(model) -> list[str]:
    """What the model says to each question asked alone."""
    pictures = [None if image is None else tiny.FOLDER / image for image, _ in QUESTIONS]
    found = [
        model.answer(picture, text, max_new_tokens=LONGEST)
        for picture, (_, text) in zip(pictures, QUESTIONS, strict=True)
    ]
    assert all(found)
    return found


@pytest.fixture
def data(tmp_path, texts) -> Path:
    write_questions(tmp_path / "data" / "own.json", texts)
    return tmp_path / "data"


def answers(out: Path, name: str = "student", task: str = "own") -> list[dict]:
    return [json.loads(line) for line in (out / name / f"{task}.jsonl").read_text().splitlines()]


def share(model: AnsweringModel, data: Path, out: Path, rank: int = 0, ranks: int = 1, **changes):
    """This rank's part of the work, without a process group."""
    chosen = options(data, out, **changes)
    (task,) = chosen.chosen_tasks()
    return work_of(chosen, chosen.models[0], model, "digest", task, task.questions(data), rank, ranks)


def answer(model: AnsweringModel, *parts) -> None:
    for part in parts:
        answer_own_share(model, part, lambda done: None)
    merge_parts(parts[0])


def test_questions_in_batches_get_the_answers_they_get_alone(tmp_path, data, texts):
    answer_all(options(data, tmp_path / "out"), None)
    rows = answers(tmp_path / "out")
    assert [row["text"] for row in rows] == texts
    assert [row["question_id"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert [row["answer_id"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert rows[0]["prompt"] == "What is this?"
    assert rows[0]["model_id"] == "student"
    metadata = rows[0]["metadata"]
    assert len(metadata.pop("model")) == 16
    assert metadata == {"precision": "fp32", "batch_size": 2, "image_padding": "pad"}
    assert sorted(path.name for path in (tmp_path / "out" / "student").iterdir()) == ["own.jsonl"]


def test_answers_that_the_model_gives_count_as_right_and_others_as_wrong(tmp_path, data, texts):
    chosen = options(data, tmp_path / "out")
    answer_all(chosen, None)
    assert score_all(chosen)["student"][0].score.value == 100
    write_questions(data / "own.json", [texts[0], "certainly not", texts[2], "neither", "nor"])
    score = score_all(chosen)["student"][0]
    kinds = {kind: numbers.estimates["score"].value for kind, numbers in score.categories["kind"].items()}
    assert kinds == {"blind": 0.0, "seen": 50.0}


def test_ranks_answer_as_one_does(tmp_path, data, model):
    answer(model, share(model, data, tmp_path / "one"))
    answer(model, *(share(model, data, tmp_path / "three", rank, 3) for rank in range(3)))
    one, three = (tmp_path / name / "student" / "own.jsonl" for name in ("one", "three"))
    assert one.read_bytes() == three.read_bytes()
    assert len(one.read_text().splitlines()) == len(QUESTIONS)


def test_each_rank_answers_only_its_batches(tmp_path, data, model):
    works = [share(model, data, tmp_path / "out", rank, 2) for rank in range(2)]
    assert [list(map(list, work.batches())) for work in works] == [[[0, 1], [4]], [[2, 3]]]
    more = share(model, data, tmp_path / "out", 3, 4)
    assert more.batches() == []
    answer(model, *works)


def test_real_ranks_answer_as_one_does(tmp_path, data):
    for ranks in (1, 2):
        write_options(options(data, tmp_path / str(ranks)))
        from launcher.backends.ranks import free_port, rank_environments

        started = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(tmp_path / str(ranks))],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for environment in rank_environments(1, ranks, free_port(), "cpu", [], os.environ)
        ]
        for process in started:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors.decode()
    one, two = (tmp_path / name / "student" / "own.jsonl" for name in ("1", "2"))
    assert one.read_bytes() == two.read_bytes()
    assert (tmp_path / "1" / "scores.json").read_bytes() == (tmp_path / "2" / "scores.json").read_bytes()


PROGRAM = f"""
import sys
import alignkd.evaluate.tasks.own as own
own.SHORT_ANSWER_TOKENS = {LONGEST}
from alignkd.evaluate.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("before", [1, 2, 3])
def test_resumed_answers_equal_undisturbed_ones_whatever_was_done_and_by_how_many(
    tmp_path, data, model, before, rows, whole, monkeypatch
):
    """``before`` ranks are killed after ``rows`` answers, the last one torn; two ranks resume."""
    out, written = tmp_path / "out", 0
    for rank in range(before):
        work = share(model, data, out, rank, before)
        work.part(rank).parent.mkdir(parents=True, exist_ok=True)
        lines = [whole[number] for batch in work.batches() for number in batch]
        kept = lines[: max(0, rows - written)]
        written += len(kept)
        torn = lines[len(kept)][:40] if len(kept) < len(lines) else ""
        work.part(rank).write_text("".join(kept) + torn)
    asked: list[int] = []
    original = answering._requests
    monkeypatch.setattr(
        answering, "_requests", lambda model, work, batch: asked.extend(batch) or original(model, work, batch)
    )
    answer(model, *(share(model, data, out, rank, 2) for rank in range(2)))
    assert (out / "student" / "own.jsonl").read_text() == "".join(whole)
    # A batch is asked as a whole, or not at all.
    assert len(asked) <= len(QUESTIONS)
    if before == 1:
        assert sorted(asked) == list(range(2 * (rows // 2), len(QUESTIONS)))


@pytest.fixture(scope="module")
def whole(model, texts, tmp_path_factory) -> list[str]:
    """The lines of an undisturbed evaluation."""
    folder = tmp_path_factory.mktemp("whole")
    write_questions(folder / "own.json", texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alignkd.evaluate.tasks.own.SHORT_ANSWER_TOKENS", LONGEST)
        answer(model, share(model, folder, folder / "out"))
    return (folder / "out" / "student" / "own.jsonl").read_text().splitlines(keepends=True)


def test_a_killed_process_resumes(tmp_path, data):
    """SIGKILL once the first answers are on disk; the slowed program would need a minute for the rest."""
    write_options(options(data, tmp_path / "out", batch_size=1))
    slow = PROGRAM.replace(
        "from alignkd.evaluate.__main__",
        "import alignkd.evaluate.answering as answering, time\n"
        "original = answering._requests\n"
        "answering._requests = lambda *values: (time.sleep(10 * values[2].start), original(*values))[1]\n"
        "from alignkd.evaluate.__main__",
    )
    part = tmp_path / "out" / "student" / "own.part-0.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", slow, str(tmp_path / "out")], env=os.environ | {"DS_ACCELERATOR": "cpu"}
    ) as killed:
        while not (part.exists() and part.stat().st_size):
            assert killed.poll() is None
            time.sleep(0.05)
        killed.send_signal(signal.SIGKILL)
    assert 0 < len(part.read_text().splitlines()) < len(QUESTIONS)
    assert main([str(tmp_path / "out")]) == 0
    write_options(options(data, tmp_path / "undisturbed", batch_size=1))
    assert main([str(tmp_path / "undisturbed")]) == 0
    resumed, undisturbed = (tmp_path / name / "student" / "own.jsonl" for name in ("out", "undisturbed"))
    assert resumed.read_bytes() == undisturbed.read_bytes()


def test_finished_answers_are_not_made_again(tmp_path, data, monkeypatch):
    answer_all(options(data, tmp_path / "out"), None)
    file = tmp_path / "out" / "student" / "own.jsonl"
    before = file.stat()
    left_over = tmp_path / "out" / "student" / "own.part-1.jsonl"
    left_over.write_text("")  # killed between merging and removing
    monkeypatch.setattr("alignkd.evaluate.program.answer_own_share", None)
    answer_all(options(data, tmp_path / "out"), None)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not left_over.exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 3}, "'batch_size': 2}, this evaluation's is {'batch_size': 3}"),
        ({"precision": "bf16"}, "'precision': 'bf16'}; move the file away"),
        ({"image_padding": "crop"}, "this evaluation's is {'image_padding': 'crop'}"),
    ],
)
def test_other_settings_are_not_mixed_into_old_answers(tmp_path, data, model, change, named):
    answer_all(options(data, tmp_path / "out"), None)
    with pytest.raises(UserError) as error:
        answer_all(options(data, tmp_path / "out", **change), None)
    assert named in str(error.value)
    assert "another folder" in str(error.value)


def test_other_weights_are_not_mixed_into_old_answers(tmp_path, data, model):
    work = share(model, data, tmp_path / "out")
    answer(model, work)
    with pytest.raises(UserError, match="'model': 'digest'"):
        answer_all(options(data, tmp_path / "out"), None)


def test_answers_to_fewer_questions_are_refused(tmp_path, data, model):
    work = share(model, data, tmp_path / "out")
    answer(model, work)
    lines = work.answers.read_text().splitlines(keepends=True)
    work.answers.write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="holds 4 answers to 5 questions"):
        is_finished(work)


def test_a_limit_asks_the_first_questions_into_a_file_of_its_own(tmp_path, data, capsys, texts):
    write_options(options(data, tmp_path / "out", limit=3))
    assert main([str(tmp_path / "out")]) == 0
    assert "PARTIAL" in capsys.readouterr().out
    assert [row["text"] for row in answers(tmp_path / "out", task="own.first-3")] == texts[:3]
    report = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert report["limit"] == 3
    assert report["models"]["student"]["tasks"]["own"]["questions"] == 3
    write_options(options(data, tmp_path / "out"))
    assert main([str(tmp_path / "out")]) == 0
    assert "PARTIAL" not in capsys.readouterr().out
    assert len(answers(tmp_path / "out")) == len(QUESTIONS)


def test_two_models_are_compared(tmp_path, data, capsys):
    models = (ModelChoice("small", str(tiny.STUDENT)), ModelChoice("large", str(tiny.TEACHER)))
    write_options(options(data, tmp_path / "out", models=models, as_json=True))
    assert main([str(tmp_path / "out")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "out" / "scores.json").read_text())
    scores = {name: found["tasks"]["own"]["score"] for name, found in report["models"].items()}
    assert scores["small"] == 100
    (compared,) = report["comparisons"]
    assert (compared["first"], compared["second"], compared["task"]) == ("small", "large", "own")
    assert compared["difference"] == pytest.approx(scores["small"] - scores["large"])
    write_options(options(data, tmp_path / "out", models=models, categories=True))
    assert main([str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "small minus large" in shown
    assert "small: own by kind" in shown
    assert "precision fp32" in shown


@pytest.mark.parametrize(
    ("content", "image_folder", "message"),
    [
        ("[", tiny.FOLDER, "not JSON"),
        ("[]", tiny.FOLDER, "at least one record"),
        ('[{"id": 1}]', tiny.FOLDER, "conversation"),
        (None, tiny.STUDENT, "image_0.png: the picture is missing"),
    ],
)
def test_unusable_input_is_one_clear_error(tmp_path, data, capsys, content, image_folder, message):
    if content is not None:
        (data / "own.json").write_text(content)
    own = OwnQuestions("own.json", str(image_folder))
    write_options(options(data, tmp_path / "out", own=own))
    assert main([str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("alignkd: error:") == 1


def test_the_program_wants_a_folder_with_options(tmp_path, capsys):
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "evaluation.json" in capsys.readouterr().err
    (tmp_path / "evaluation.json").write_text('{"models": [], "own": null, "speed": 1}')
    assert main([str(tmp_path)]) == 2
    assert "unknown: speed" in capsys.readouterr().err


def test_a_broken_picture_ends_the_evaluation_and_keeps_the_answers_before_it(tmp_path, data, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("image_0.png", "image_1.png"):
        (pictures / name).write_bytes((tiny.FOLDER / name).read_bytes())
    (pictures / "image_1.png").write_bytes(b"no picture")
    write_options(options(data, tmp_path / "out", own=OwnQuestions("own.json", str(pictures))))
    assert main([str(tmp_path / "out")]) == 2
    assert "image_1.png: not a picture" in capsys.readouterr().err
    part = tmp_path / "out" / "student" / "own.part-0.jsonl"
    assert len(part.read_text().splitlines()) == 2
    (pictures / "image_1.png").write_bytes((tiny.FOLDER / "image_1.png").read_bytes())
    assert main([str(tmp_path / "out")]) == 0
    assert len(answers(tmp_path / "out")) == len(QUESTIONS)
