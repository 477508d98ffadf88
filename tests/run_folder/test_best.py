"""Which checkpoint is the best, by the manifests."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from alignkd.errors import UserError
from alignkd.run_folder import best
from alignkd.run_folder.best import Best, best_checkpoint, best_of_run, best_step
from alignkd.run_folder.checkpoints import MANIFEST, MARKER, step_folder


def save(
    run: Path, step: int, marked: bool = True, on: dict[str, Any] | None = None, **evaluation: Any
) -> None:
    folder = step_folder(run, step)
    folder.mkdir(parents=True)
    facts = {"evaluation": evaluation} if evaluation else {}
    facts |= {"evaluated_on": on} if on is not None else {}
    (folder / MANIFEST).write_text(json.dumps({"step": step, "files": {}, **facts}))
    if marked:
        (folder / MARKER).touch()


def test_the_best_is_the_lowest_finite_value_of_a_committed_checkpoint_and_of_equals_the_first(
    tmp_path: Path,
) -> None:
    save(tmp_path, 1)
    assert best_checkpoint(tmp_path, "loss") is None
    save(tmp_path, 2, loss=2.0, ce=1.0)
    save(tmp_path, 3, loss=1.5, ce=1.2)
    save(tmp_path, 4, loss=1.5, ce=1.3)
    save(tmp_path, 5, marked=False, loss=0.1)
    save(tmp_path, 6, loss=math.nan)
    save(tmp_path, 7, loss=0.1)
    (step_folder(tmp_path, 7) / MANIFEST).write_text("{")
    assert best_checkpoint(tmp_path, "loss") == Best(3, 1.5, "loss")
    assert best_checkpoint(tmp_path, "ce") == Best(2, 1.0, "ce")
    (tmp_path / "config.yaml").write_text("evaluation: {best: ce}\n")
    assert best_of_run(tmp_path) == Best(2, 1.0, "ce")
    assert best_step(tmp_path) == 2
    (tmp_path / "config.yaml").write_text("model: {}\n")
    assert best_step(tmp_path) == 3


def test_only_values_that_can_be_compared_with_the_newest_ones_count(tmp_path: Path) -> None:
    on: dict[str, Any] = {"data": "d", "samples": 8, "loss": {"temperature": 1.0}}
    save(tmp_path, 1, loss=0.1, ce=0.1)  # by an earlier version, which does not say
    save(tmp_path, 2, on={**on, "data": "other"}, loss=0.1, ce=0.1)
    save(tmp_path, 3, on={**on, "samples": 4}, loss=0.1, ce=0.1)
    save(tmp_path, 4, on={**on, "loss": {"temperature": 2.0}}, loss=0.1, ce=0.5)
    save(tmp_path, 5, on=on, loss=0.7, ce=0.8)
    save(tmp_path, 6, on=on, loss=0.9, ce=0.9)
    save(tmp_path, 7)
    assert best_checkpoint(tmp_path, "loss") == Best(5, 0.7, "loss")
    assert best_checkpoint(tmp_path, "ce") == Best(4, 0.5, "ce")  # whatever the terms of the loss
    assert best_checkpoint(tmp_path, "loss", {**on, "samples": 4}) == Best(3, 0.1, "loss")
    assert best_checkpoint(tmp_path, "loss", {**on, "samples": 5}) is None


def test_the_best_accuracy_is_the_highest_on_the_same_questions_whatever_the_held_out_data(
    tmp_path: Path,
) -> None:
    asked = {"accuracy": {"task": "sample", "questions": "q"}}
    save(tmp_path, 1, on={"accuracy": {**asked["accuracy"], "questions": "other"}}, accuracy=99.0)
    save(tmp_path, 2, on={**asked, "data": "other", "samples": 8}, loss=0.1, accuracy=75.0)
    save(tmp_path, 3, on={**asked, "data": "d", "samples": 8}, loss=0.3, accuracy=75.0)
    save(tmp_path, 4, on={**asked, "data": "d", "samples": 8}, loss=0.2, accuracy=50.0)
    assert best_checkpoint(tmp_path, "accuracy") == Best(2, 75.0, "accuracy")
    assert best_checkpoint(tmp_path, "loss") == Best(4, 0.2, "loss")
    save(tmp_path, 5, on=asked, accuracy=math.nan)
    assert best_checkpoint(tmp_path, "accuracy", asked) == Best(2, 75.0, "accuracy")


def test_neither_a_run_without_an_evaluated_checkpoint_nor_another_folder_has_a_best_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text("{}\n")
    save(tmp_path, 2)
    with pytest.raises(UserError, match=r"--step best: no checkpoint of .* was evaluated"):
        best_step(tmp_path)
    for folder in (tmp_path / "checkpoints", tmp_path / "mistyped"):
        with pytest.raises(UserError, match=f"{re.escape(str(folder))}: --step best is for a run folder"):
            best_step(folder)

    def failing(_folder: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(best, "read_manifest", failing)
    with pytest.raises(UserError, match="cannot be told"):
        best_step(tmp_path)
