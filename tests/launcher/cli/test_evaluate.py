"""``alignkd eval`` and ``chat``. The rules themselves are tested in tests/evaluate/tasks."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignkd.evaluate.options import EvalOptions, ModelChoice, OwnQuestions
from launcher.commands.evaluate import absolute, evaluation_command
from tests import tiny
from tests.evaluate.made_up import Maker, random_model
from tests.launcher.cli.command import ROOT, alignkd

LABELS = ("yes", "no", "no", "yes")
ASK = ("--task", "own", "--questions", "own.json", "--metric", "yes-no")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    records = [
        {
            "id": str(number),
            "image": f"{number}.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nIs it?"},
                {"from": "gpt", "value": label},
            ],
        }
        for number, label in enumerate(LABELS)
    ]
    (tmp_path / "own.json").write_text(json.dumps(records))
    for name, texts in (("good", LABELS), ("worse", ("yes", "no", "yes", "no"))):
        rows = [{"question_id": str(number), "text": text} for number, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_scores_and_a_comparison_as_json(data: Path) -> None:
    files = ("--score", str(data / "good.jsonl"), "--score", str(data / "worse.jsonl"))
    done = alignkd("eval", *ASK, "--data", str(data), *files, "--json")
    assert done.returncode == 0, done.stderr
    assert "torch" not in done.imported  # the statistics need numpy
    report = json.loads(done.stdout)
    assert report["tasks"]["own"]["score"] == 100
    assert report["other"]["tasks"]["own"]["score"] == 50
    assert report["comparison"][0]["difference"] == 50


def test_scores_as_tables_in_80_columns(data: Path) -> None:
    files = ("--score", str(data / "good.jsonl"), "--score", str(data / "worse.jsonl"))
    done = alignkd("eval", *ASK, "--data", str(data), *files)
    assert done.returncode == 0, done.stderr
    assert "100.0" in done.stdout
    assert "worse" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "popa", "--check"), "did you mean pope?"),
        (("--task", "pope"), "give either models, --check or --score FILE"),
        (("nowhere", "--task", "pope"), "nowhere: no such folder"),
        (("a=x", "b/a", "--task", "pope"), "models x and b/a are both called a; name one: NAME=b/a"),
        (("model.jsonl", "--task", "pope", "--check"), "give either models, --check or --score FILE"),
        ((tiny.STUDENT, "--task", "pope", "--step", "4"), "--step 4 is for a run folder"),
        ((tiny.STUDENT, "--task", "pope"), "coco_pope_adversarial.json"),
        ((tiny.STUDENT, *ASK), "own: 4 pictures are missing"),
        (("--task", "own", "--check"), "--task own (alone) and --questions FILE go together"),
        (("--task", "gqa,pope", "--score", "x.jsonl"), "one or two answer files of one task"),
        (("--task", "pope", "--check"), "coco_pope_adversarial.json"),
        (("--task", "pope", "--check", "--metric", "vqa"), "only for --task own"),
        (("--task", "mmbench", "--check", "--upload", "up.tsv"), "--upload needs --score FILE"),
        ((tiny.STUDENT, "--task", "pope", "--time", "60"), "only for a Slurm job (--nodes N)"),
        ((tiny.STUDENT, "--task", "pope", "--gpus-per-node", "2"), "only for a Slurm job (--nodes N)"),
        ((tiny.STUDENT, "--task", "pope", "--nodes", "2", "--ranks", "2"), "--gpus-per-node instead of"),
        (("--task", "pope", "--check", "--nodes", "2"), "--nodes N is for models"),
        ((tiny.STUDENT, "--task", "pope", "--nodes", "2"), "coco_pope_adversarial.json"),
        ((*ASK, "--image-folder", "nowhere", "--check"), "nowhere/0.jpg"),
        ((*ASK, "--score", "missing.jsonl"), "missing.jsonl"),
        ((*ASK, "--score", "x.jsonl", "--score", "x.jsonl"), "given twice"),
        ((*ASK, "--score", "x.jsonl", "--upload", "up.tsv"), "only mmbench has an upload file"),
    ],
)
def test_a_wrong_request_is_one_error(data: Path, arguments: tuple[str, ...], message: str) -> None:
    (data / "x.jsonl").write_text((data / "good.jsonl").read_text())
    arguments = tuple(str(data / word) if str(word).endswith(".jsonl") else str(word) for word in arguments)
    done = alignkd("eval", "--data", str(data), *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "torch" not in done.imported


@pytest.fixture(scope="module")
def gqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions and a model that answers them briefly."""
    folder = tmp_path_factory.mktemp("gqa")
    Maker(folder / "data", {"gqa": 40}).make()
    random_model(folder / "model")
    return folder


def evaluation(folder: Path, *more: object) -> list[object]:
    data = folder / "data"
    return ["eval", folder / "model", "--task", "gqa", "--data", data, "--batch-size", 4, *more]


def test_models_are_evaluated_on_any_number_of_ranks(gqa: Path, tmp_path: Path) -> None:
    one = alignkd(*evaluation(gqa, "--out", tmp_path / "one"))
    assert one.returncode == 0, one.stderr
    assert "torch" not in one.imported  # the ranks are processes of their own
    assert "Scores ± standard error" in one.stdout
    assert "precision fp32, batch_size 4, image_padding pad" in one.stdout
    two = alignkd(*evaluation(gqa, "--out", tmp_path / "two", "--ranks", 2, "--json"))
    assert two.returncode == 0, two.stderr
    report = json.loads(two.stdout)
    assert report == json.loads((tmp_path / "one" / "scores.json").read_text())
    assert report["models"]["model"]["tasks"]["gqa"]["questions"] == 40
    rows = [(tmp_path / name / "model" / "gqa.jsonl").read_bytes() for name in ("one", "two")]
    assert rows[0] == rows[1]
    answers = tmp_path / "two" / "model" / "gqa.jsonl"
    scored = alignkd("eval", "--task", "gqa", "--data", gqa / "data", "--json", "--score", answers)
    assert json.loads(scored.stdout) == report["models"]["model"]


def test_a_rank_that_fails_ends_the_others_and_is_named(gqa: Path, tmp_path: Path) -> None:
    part = tmp_path / "out" / "model" / "gqa.part-1.jsonl"
    part.parent.mkdir(parents=True)
    with part.open("w") as held:  # as by another evaluation, and only rank 1 wants it
        fcntl.flock(held, fcntl.LOCK_EX)
        done = alignkd(*evaluation(gqa, "--out", tmp_path / "out", "--ranks", 2))
    assert done.returncode == 2
    assert "rank 1 failed, see" in done.stderr
    assert "gqa.part-1.jsonl: another evaluation is writing it" in done.stderr
    assert "Traceback" not in done.stderr


# Each batch takes longer than the one before, so that the test is in time to stop it.
SLOW_RANK = """
import sys, time
import alignkd.evaluate.answering as answering
from alignkd.evaluate.__main__ import main
requests = answering._requests
answering._requests = lambda model, work, batch: (
    time.sleep(0.5 * batch.start), requests(model, work, batch)
)[1]
sys.exit(main(sys.argv[1:]))
"""
SLOW = f"""
import sys
import launcher.commands.evaluate as evaluate
evaluate.evaluation_command = lambda out: [sys.executable, "-c", {SLOW_RANK!r}, str(out)]
from launcher.cli.app import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_evaluation_that_is_stopped_or_killed_resumes(gqa: Path, tmp_path: Path, number: int) -> None:
    arguments = [str(word) for word in evaluation(gqa, "--out", tmp_path / "out")]
    part = tmp_path / "out" / "model" / "gqa.part-0.jsonl"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "80"}
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments], env=environment, stderr=subprocess.PIPE, text=True
    ) as stopped:
        while not (part.exists() and part.stat().st_size):
            assert stopped.poll() is None
            time.sleep(0.05)
        stopped.send_signal(number)
        _, errors = stopped.communicate(timeout=60)
    assert stopped.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert ("the same command resumes" in errors) == (number == signal.SIGINT)
    assert "Traceback" not in errors
    done = alignkd(*evaluation(gqa, "--out", tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    undisturbed = alignkd(*evaluation(gqa, "--out", tmp_path / "undisturbed"))
    assert undisturbed.stdout == done.stdout
    rows = [(tmp_path / name / "model" / "gqa.jsonl").read_bytes() for name in ("out", "undisturbed")]
    assert rows[0] == rows[1]


def test_one_rank_is_a_command_that_any_launcher_can_run(tmp_path: Path) -> None:
    assert evaluation_command(tmp_path) == [sys.executable, "-m", "alignkd.evaluate", str(tmp_path)]


def test_ranks_find_every_path_from_any_folder() -> None:
    given = EvalOptions((ModelChoice("a", "x/a"),), "own", "data", "out", OwnQuestions("q.json", "images"))
    here, written = Path.cwd(), absolute(given)
    assert written.models == (ModelChoice("a", str(here / "x" / "a")),)
    assert (written.data, written.out) == (str(here / "data"), str(here / "out"))
    assert written.own == OwnQuestions("q.json", str(here / "images"))  # questions lie below the data


def chat(*arguments: object, lines: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher.cli", "chat", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120, env=environment)


def test_chat_answers_every_line_and_remembers_the_ones_before(gqa: Path) -> None:
    lines = "What is it?\nWhich colour?\n\nWhich colour?\nWhat is it?\n\nWhat is it?\n"
    done = chat(gqa / "model", tiny.FOLDER / "image_0.png", "--max-new-tokens", 6, lines=lines)
    assert done.returncode == 0, done.stderr
    first, second, second_alone, first_later, first_again = done.stdout.splitlines()
    assert first_again == first  # an empty line starts anew
    assert first_later != first
    assert second_alone != second


def test_chat_refuses_what_it_cannot_use(gqa: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((tmp_path / "none", tiny.FOLDER / "image_0.png"), "none: no such folder"),
        ((gqa / "model", tmp_path / "none.png"), "none.png: the picture is missing"),
    ):
        done = chat(*arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--then-eval", "pope"), "--then-eval TASKS and --eval-data DIR go together"),
        (("--eval-data", "x"), "--then-eval TASKS and --eval-data DIR go together"),
        (("--then-eval", "pope", "--eval-data", "x"), "here nothing is queued: run `alignkd eval` after"),
    ],
)
def test_an_evaluation_after_a_run_that_cannot_follow_it_is_refused(
    config_file: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = alignkd("launch", config_file, "--backend", "local", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (config_file.parent / "runs").exists()
