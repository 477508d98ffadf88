"""Exit codes and messages of programs that work on a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignkd.errors import EXIT_USER_ERROR, CheckpointError, UserError
from alignkd.folder_program import EXIT_INTERRUPTED, run_on_folder


def test_the_folder_is_the_only_argument_and_the_exit_code_that_of_the_work(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = []

    def work(folder: Path) -> int:
        seen.append(folder)
        return 7

    assert run_on_folder("program FOLDER", ["a/b"], work) == 7
    assert seen == [Path("a/b")]
    for arguments in ([], ["a", "b"]):
        assert run_on_folder("program FOLDER", arguments, work) == EXIT_USER_ERROR
        assert capsys.readouterr().err == "usage: python -m program FOLDER\n"
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("a: is wrong"), UserError("").exit_code, "alignkd: error: a: is wrong\n"),
        (CheckpointError("b"), CheckpointError("").exit_code, "alignkd: error: b\n"),
        (KeyboardInterrupt(), EXIT_INTERRUPTED, "stopped; the same command resumes\n"),
    ],
)
def test_an_error_is_a_message_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    def work(_folder: Path) -> int:
        raise error

    assert run_on_folder("program FOLDER", ["a"], work) == code
    assert capsys.readouterr().err == message
