"""Teacher and student must share tokens and preprocessing; every disagreement is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alignkd.config.schema import ModelSection
from alignkd.errors import CheckpointError
from alignkd.models.agreement import check_agreement, student_folder, student_model_config, tokenizer_hash
from tests import tiny
from tests.model_folders import TOWER_NAME, change_json, copy_model, plain_llama


def section(student: Path | str, teacher: Path | None = tiny.TEACHER, **changes: Any) -> ModelSection:
    return ModelSection(teacher=None if teacher is None else str(teacher), student=str(student), **changes)


def test_the_fixture_models_agree() -> None:
    assert check_agreement(section(tiny.STUDENT), 16) == []
    assert check_agreement(section(tiny.STUDENT), 144) == []


@pytest.mark.parametrize(
    ("config", "preprocessing", "message"),
    [
        ({"vocab_size": 700}, {}, "vocabulary sizes differ: teacher 600, student 700"),
        (
            {"mm_vision_tokens_per_side": 6},
            {},
            "vision tokens per image differ: teacher 144, student 36",
        ),
        ({}, {"resample": 2}, "image preprocessing differs in `resample`: teacher 3, student 2"),
        ({}, {"image_mean": [0, 0, 0]}, "image preprocessing differs in `image_mean`"),
        ({}, {"do_rescale": False}, "`do_rescale`: teacher True, student False"),
        ({}, {"size": 448}, "`size`: teacher {'shortest_edge': 336}, student {'shortest_edge': 448}"),
    ],
)
def test_each_disagreement_is_named(
    tmp_path: Path, config: dict[str, Any], preprocessing: dict[str, Any], message: str
) -> None:
    student = copy_model(tmp_path / "student", **config)
    change_json(student / TOWER_NAME / "preprocessor_config.json", **preprocessing)
    problems = check_agreement(section(student), 16)
    assert len(problems) == 1
    assert message in problems[0]


def test_a_different_tokenizer_is_named(tmp_path: Path) -> None:
    student = copy_model(tmp_path / "student")
    (student / "tokenizer.model").write_bytes(b"another")
    assert check_agreement(section(student), 16) == [
        "teacher and student have different tokenizers (tokenizer.model differs)"
    ]


def test_all_disagreements_are_named_at_once(tmp_path: Path) -> None:
    student = copy_model(tmp_path / "student", vocab_size=700, mm_vision_tokens_per_side=6)
    (student / "tokenizer.model").write_bytes(b"another")
    change_json(student / TOWER_NAME / "preprocessor_config.json", resample=2, do_normalize=False)
    problems = check_agreement(section(student), 40)
    words = ("tokenizers", "vocabulary", "vision tokens per image", "`resample`", "`do_normalize`", "top_k")
    assert len(problems) == len(words)
    for word in words:
        assert any(word in problem for problem in problems), word


def test_an_error_about_top_k_names_the_valid_range() -> None:
    assert check_agreement(section(tiny.STUDENT), 145) == [
        "distillation.top_k is 145, but an image has 144 vision tokens; valid: 1 to 144"
    ]


def test_two_unreadable_folders_are_both_named(tmp_path: Path) -> None:
    student = copy_model(tmp_path / "student", hidden_act="gelu")
    (student / "tokenizer.model").unlink()
    problems = check_agreement(section(student, tmp_path / "nowhere"), 16)
    for part in (
        "`hidden_act` is 'gelu'",
        f"{student / 'tokenizer.model'}: no such file",
        f"{tmp_path / 'nowhere' / 'config.json'}: no such file",
    ):
        assert any(part in problem for problem in problems), part


def test_without_a_teacher_only_the_student_is_checked(tmp_path: Path) -> None:
    assert check_agreement(section(tiny.STUDENT, None), 1) == []
    assert len(check_agreement(section(copy_model(tmp_path / "bad", hidden_act="gelu"), None), 1)) == 1


def test_a_plain_llama_is_compared_as_it_will_be_completed(tmp_path: Path) -> None:
    llama = plain_llama(tmp_path / "llama")
    assert check_agreement(section(llama, vision_tower=str(tiny.TEACHER)), 16) == []
    assert "no vision tower" in check_agreement(section(llama), 16)[0]


def test_a_student_from_scratch_is_described_by_model_student_config(tmp_path: Path) -> None:
    facts = plain_llama(tmp_path / "facts")
    scratch = section("scratch", student_config=str(facts), vision_tower=str(tiny.TEACHER))
    assert student_folder(scratch) == facts
    assert student_model_config(scratch).hidden_size == 48
    assert check_agreement(scratch, 16) == []


def test_the_hash_needs_a_tokenizer(tmp_path: Path) -> None:
    assert tokenizer_hash(tiny.STUDENT) == tokenizer_hash(tiny.TEACHER)
    with pytest.raises(CheckpointError, match=r"tokenizer.model: no such file; a model folder needs"):
        tokenizer_hash(tmp_path)
