"""``alignkd eval``: answers in, scores out. The rules themselves are tested in tests/evaluate/tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launcher.cli.command import alignkd

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
        (("--task", "own", "--check"), "--task own (alone) and --questions FILE go together"),
        (("--task", "gqa,pope", "--score", "x.jsonl"), "one or two answer files of one task"),
        (("--task", "pope", "--check"), "coco_pope_adversarial.json"),
        (("--task", "pope", "--check", "--metric", "vqa"), "only for --task own"),
        (("--task", "mmbench", "--check", "--upload", "up.tsv"), "--upload needs --score FILE"),
        ((*ASK, "--image-folder", "nowhere", "--check"), "nowhere/0.jpg"),
        ((*ASK, "--score", "missing.jsonl"), "missing.jsonl"),
        ((*ASK, "--score", "x.jsonl", "--score", "x.jsonl"), "given twice"),
        ((*ASK, "--score", "x.jsonl", "--upload", "up.tsv"), "only mmbench has an upload file"),
    ],
)
def test_a_wrong_request_is_one_error(data: Path, arguments: tuple[str, ...], message: str) -> None:
    (data / "x.jsonl").write_text((data / "good.jsonl").read_text())
    arguments = tuple(str(data / word) if word.endswith(".jsonl") else word for word in arguments)
    done = alignkd("eval", "--data", str(data), *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
