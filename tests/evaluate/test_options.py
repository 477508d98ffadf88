from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from alignkd.errors import UserError
from alignkd.evaluate import gguf_limits
from alignkd.evaluate.options import (
    EvalOptions,
    ModelChoice,
    OwnQuestions,
    answers_file,
    chosen_tasks,
    named_models,
    read_options,
    write_options,
)
from tests import tiny

MODELS = (ModelChoice("a", "x/a"),)


def test_options_are_read_as_they_were_written(tmp_path: Path) -> None:
    for own in (None, OwnQuestions("q.json", "images", "vqa")):
        written = EvalOptions(
            MODELS, "gqa,pope", "data", str(tmp_path / "new"), own, 4, "bf16", 8, 100, "crop", True, True
        )
        write_options(written)
        assert read_options(tmp_path / "new") == written


def test_models_are_called_by_their_folders_or_as_told(tmp_path: Path) -> None:
    run = tmp_path / "finetune"
    (run / "student").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    other = tmp_path / "student"  # a run or model of this name, not an export inside a run
    other.mkdir()
    given = [str(run), f"better={run}", str(other), f"export={run / 'student'}"]
    assert [model.name for model in named_models(given)] == ["finetune", "better", "student", "export"]
    assert named_models([str(run / "student")])[0].name == "finetune"
    assert named_models([f"better={run}"]) == (ModelChoice("better", str(run)),)
    equals = tmp_path / "lr=4e-5"
    equals.mkdir()
    assert named_models([str(equals)]) == (ModelChoice("lr=4e-5", str(equals)),)
    with pytest.raises(UserError, match="are both called finetune; name one: NAME="):
        named_models([str(run), str(run / "student")])
    for wrong in ("=x", "x=", "../x=y", ".=y"):
        with pytest.raises(UserError, match="must be a folder, or NAME=FOLDER"):
            named_models([wrong])


def test_answers_to_the_first_questions_have_a_file_of_their_own() -> None:
    options = EvalOptions(MODELS, "gqa", "data", "out")
    assert answers_file(options, "a", "gqa") == Path("out/a/gqa.jsonl")
    limited = EvalOptions(MODELS, "gqa", "data", "out", limit=7)
    assert answers_file(limited, "a", "gqa") == Path("out/a/gqa.first-7.jsonl")


def test_wrong_options_are_errors_before_a_model_is_loaded(tmp_path: Path) -> None:
    for changes, message in (
        ({"models": (ModelChoice("x", str(tmp_path / "none")),)}, "no such folder"),
        ({"step": 2}, "--step 2 is for a run folder"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"limit": 0}, "must be at least 1"),
        ({"precision": "int8"}, "--precision int8: valid: bf16, fp16, fp32"),
    ):
        values = {"models": (ModelChoice("x", str(tiny.STUDENT)),)} | changes
        with pytest.raises(UserError, match=message):
            EvalOptions(tasks="gqa", data="data", out="out", **values).check()


def test_a_gguf_among_the_models_is_checked_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("text.gguf", "mmproj.gguf"):
        (tmp_path / name).write_bytes(b"")
    models = (ModelChoice("x", str(tiny.STUDENT)), ModelChoice("phone", str(tmp_path)))
    options = EvalOptions(models, "gqa", "data", "out")
    options.check()
    with pytest.raises(UserError, match="precision 'bf16': a GGUF has the one it was exported with"):
        replace(options, precision="bf16").check()
    with pytest.raises(UserError, match=r"--image-padding crop: llama\.cpp decides by itself"):
        replace(options, image_padding="crop").check()
    monkeypatch.setattr(gguf_limits, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'alignkd\[gguf\]'"):
        options.check()
    options.check(in_this_python=False)


def test_own_questions_and_their_task_go_together() -> None:
    own = OwnQuestions("q.json")
    assert chosen_tasks("own", Path(), own)[0].name == "own"
    assert [task.name for task in chosen_tasks("sample,gqa", Path(), None)] == ["gqa", "sample"]
    for names, given in (("own", None), ("gqa", own), ("own,gqa", own)):
        with pytest.raises(UserError, match="go together"):
            chosen_tasks(names, Path(), given)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_options(EvalOptions(MODELS, "gqa", "data", str(tmp_path / "file" / "out")))
