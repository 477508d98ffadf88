"""What a report calls answer files."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.commands.score import names_of


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["eval/a.jsonl"], ["a"]),
        (["eval/a.jsonl", "eval/b.jsonl"], ["a", "b"]),
        (["eval/student/pope.jsonl", "eval/teacher/pope.jsonl"], ["student", "teacher"]),
        (["x/s/pope.jsonl", "y/s/pope.jsonl"], ["x/s/pope.jsonl", "y/s/pope.jsonl"]),
    ],
)
def test_two_answer_files_have_two_names(files: list[str], names: list[str]) -> None:
    assert names_of([Path(file) for file in files]) == names
