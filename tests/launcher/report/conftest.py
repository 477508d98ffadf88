"""A run folder with rows, and an evaluation of its models, without a training and without a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from alignkd.evaluate.options import EvalOptions, ModelChoice, OwnQuestions, write_options
from alignkd.run_folder.atomic_files import write_json
from alignkd.run_folder.paths import RunPaths
from launcher.run.attempts import Attempt

QUESTIONS = 40


def write_rows(run: Path, steps: int = 20, **columns: float) -> None:
    rows = [
        {
            "step": step,
            "total_steps": 20,
            "loss": 3.0 / step,
            "ce": 1.0 / step,
            "reverse_kl": 2.0 / step,
            "attention": 0.0,
            "vision_all": 0.5,
            "vision_focus": 1.0,
            "learning_rate": 1e-4,
            "step_seconds": 2.0,
            "teacher_seconds_share": 0.25,
            "student_seconds_share": 0.5,
            "optimizer_seconds_share": 0.1,
            "data_wait_share": 0.05,
            "skipped_steps": 0,
            "skipped_samples": 0,
            **columns,
        }
        for step in range(1, steps + 1)
    ]
    RunPaths(run).metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


def close_attempt(run: Path, reason: str = "done", **changes: Any) -> None:
    values: dict[str, Any] = {"end": 1050.0, "last_step": 20, "saved_step": 20, "lost_steps": 0, **changes}
    line = json.dumps(asdict(Attempt(1, "", "here", 1000.0, 0, reason=reason, **values)))
    with RunPaths(run).attempts.open("a") as file:
        file.write(line + "\n")


def finish(run: Path) -> None:
    """A run that is done after 20 steps and 50 seconds, 40 of them in steps."""
    write_rows(run)
    close_attempt(run)
    result = {
        "status": "done",
        "step": 20,
        "total_steps": 20,
        "saves": {"held_seconds": 4.0},
        "peak_memory_bytes_per_rank": [2e9, 3e9],
    }
    RunPaths(run).result.write_text(json.dumps(result))
    progress = {"phase": "done", "step": 20, "total_steps": 20, "updated": 1050.0}
    RunPaths(run).progress.write_text(json.dumps(progress))


@pytest.fixture
def run(make_run) -> Path:
    folder, manifest = make_run()
    # Not of this checkout, which may have local changes.
    write_json(RunPaths(folder).manifest, {**manifest.as_dict(), "git_commit": "0123456789abcdef"})
    finish(folder)
    return folder


@pytest.fixture
def evaluate(tmp_path: Path) -> Callable[..., Path]:
    """Folder of an evaluation of own questions: model name -> (folder, number of right answers)."""

    def make(
        models: dict[str, tuple[Path, int]],
        question: str = "What is it?",
        questions: int = QUESTIONS,
        image: str | None = None,
        **changes: Any,
    ) -> Path:
        data, out = tmp_path / "questions", tmp_path / "eval"
        data.mkdir(exist_ok=True)
        marker = "" if image is None else "<image>\n"
        records = [
            {
                "id": str(number),
                **({} if image is None else {"image": image}),
                "conversations": [
                    {"from": "human", "value": f"{marker}{question} {number}"},
                    {"from": "gpt", "value": "yes"},
                ],
            }
            for number in range(questions)
        ]
        (data / "own.json").write_text(json.dumps(records))
        choices = tuple(ModelChoice(name, str(folder)) for name, (folder, _) in models.items())
        options = EvalOptions(choices, "own", str(data), str(out), OwnQuestions("own.json"))
        write_options(EvalOptions(**{**vars(options), **changes}))
        for name, (_, right) in models.items():
            (out / name).mkdir(exist_ok=True)
            rows = [
                {"question_id": str(number), "prompt": question, "text": "yes" if number < right else "no"}
                for number in range(questions)
            ]
            (out / name / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return out

    return make


@pytest.fixture
def copied_run(run: Path) -> Callable[[str], Path]:
    """A copy of the run, under another name beside it."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(run, run.parent / name))

    return copy
