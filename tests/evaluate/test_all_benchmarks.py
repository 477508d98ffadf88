"""All six benchmarks in their published formats, from the questions to the average."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignkd.evaluate.options import EvalOptions, ModelChoice
from alignkd.evaluate.program import answer_all, score_all
from alignkd.evaluate.report import report_json
from tests.evaluate.made_up import PUBLISHED, Maker, random_model

SIZES = {"gqa": 40, "sqa": 8, "textvqa": 10, "pope": 24, "mme": 56, "mmbench": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("all")
    Maker(folder / "data", SIZES).make()
    random_model(folder / "model")
    return folder


def options(folder: Path, name: str, **changes) -> EvalOptions:
    models = (ModelChoice("model", str(folder / "model")),)
    return EvalOptions(models, "all", str(folder / "data"), str(folder / name), precision="fp32", **changes)


def test_all_six_are_asked_scored_and_averaged(folder: Path) -> None:
    chosen = options(folder, "whole")
    answer_all(chosen, None)
    report = report_json(score_all(chosen), None)["models"]["model"]
    tasks = report["tasks"]
    assert {name: task["questions"] for name, task in tasks.items()} == SIZES | {"mmbench": 3}
    parts = [task["score"] / (20 if name == "mme" else 1) for name, task in tasks.items()]
    assert report["average"] == pytest.approx(sum(parts) / 6, abs=0.02)
    for name, task in tasks.items():
        assert task["settings"]["image_padding"] == ("crop" if name == "sqa" else "pad")
        assert any("the published file has" in note for note in task["notes"])
        rows = [json.loads(line) for line in (folder / "whole" / "model" / f"{name}.jsonl").open()]
        assert len(rows) == SIZES[name] * (2 if name == "sqa" else 1)
        assert len({row["text"] for row in rows}) > 1
        assert all("<image>" not in row["prompt"] for row in rows if name != "sqa")


def test_a_limit_scores_each_task_on_its_first_questions(folder: Path) -> None:
    chosen = options(folder, "first", limit=5)
    answer_all(chosen, None)
    tasks = report_json(score_all(chosen), 5)["models"]["model"]["tasks"]
    # 5 entries of sqa hold 3 with an image; 5 of mme two whole images; 5 rows of mmbench two questions.
    expected = {"gqa": 5, "sqa": 3, "textvqa": 5, "pope": 5, "mme": 4, "mmbench": 2}
    assert {name: task["questions"] for name, task in tasks.items()} == expected


def test_published_sizes_are_those_of_the_notes() -> None:
    from alignkd.evaluate.tasks import gqa, mmbench, mme, pope, sqa, textvqa

    found = {
        "gqa": gqa.PUBLISHED_QUESTIONS,
        "sqa": sqa.PUBLISHED_IMAGE_QUESTIONS,
        "textvqa": textvqa.PUBLISHED_QUESTIONS,
        "pope": pope.PUBLISHED_QUESTIONS,
        "mme": mme.PUBLISHED_QUESTIONS,
        "mmbench": mmbench.PUBLISHED_ROWS,
    }
    assert found == PUBLISHED
