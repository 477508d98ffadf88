import contextlib
import io

import pytest

from alignkd.errors import ConfigError, report_error
from launcher.run.exit_codes import exit_code, failed_rank, failure_line, failure_report, tail


@pytest.mark.parametrize(
    ("codes", "first", "code"),
    [
        ({0: 0, 1: 0}, None, 0),
        ({1: 85, 0: 85}, None, 85),
        ({1: 86, 0: 86}, None, 86),
        ({1: 85, 0: 86}, None, 86),
        ({1: 3, 0: 1}, 1, 3),
        ({1: 0, 0: 2}, 0, 2),
        ({0: 1, 1: 2}, 1, 2),  # rank 0 lost its connection to rank 1, and ended first
        ({1: -9, 0: -15}, 1, 137),
        ({0: -9, 1: -15}, 0, 137),
        ({2: 0, 1: 1, 3: 3}, 1, 1),
        ({1: 86, 0: 1}, 0, 1),
    ],
)
def test_the_exit_code_is_that_of_the_rank_to_blame(codes, first, code) -> None:
    assert failed_rank(codes) == first
    assert exit_code(codes) == code


def test_a_user_error_is_shown_without_the_rest_of_the_log(tmp_path) -> None:
    log = tmp_path / "rank-1.log"
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        assert report_error(ConfigError("a.yaml", ["first", "second\nmore"])) == 2
    log.write_text("noise\n" + stderr.getvalue() + "goodbye from a library\n")
    shown = failure_report(1, 2, log)
    assert shown.splitlines() == ["a.yaml: 2 problems", "  - first", "  - second", "  more"]


def test_a_crash_shows_the_end_of_its_log(tmp_path) -> None:
    log = tmp_path / "rank-1.log"
    log.write_text("\n".join(f"line {n}" for n in range(100)) + "\nBoom\x1b[31m\n")
    shown = failure_report(1, 1, log)
    assert "rank 1 ended with exit code 1" in shown
    assert "line 99" in shown
    assert "line 3\n" not in shown
    assert "\x1b" not in shown
    assert "SIGSEGV" in failure_report(1, -11, log)
    assert "(empty)" in failure_report(2, 1, tmp_path / "missing")


def test_exit_code_2_without_a_message_is_a_crash(tmp_path) -> None:
    log = tmp_path / "log"
    log.write_text("usage: ...\n")
    assert "usage: ..." in failure_report(0, 2, log)


def test_only_the_end_of_a_large_log_is_read(tmp_path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * 10_000_000 + b"\xff\nend\n")
    lines = tail(log)
    assert lines[-1] == "end"
    assert sum(map(len, lines)) < 100_000


def test_one_line_names_the_exception_of_the_last_attempt(tmp_path) -> None:
    log = tmp_path / "log"
    log.write_text("=== attempt 1: a\nOldError: x\n=== attempt 2: a\nRuntimeError: no\ngoodbye\n")
    assert failure_line(3, 1, log) == "rank 3 ended with exit code 1: RuntimeError: no"
    log.write_text("=== attempt 1: a\nOldError: x\n=== attempt 2: a\nhello\ngoodbye\n")
    assert failure_line(3, -9, log) == "rank 3 was killed by SIGKILL: goodbye"
    log.write_text("RuntimeError: no\nalignkd: error: a: 2 problems\n  - x\n")
    assert failure_line(3, 2, log) == "rank 3 ended with exit code 2: a: 2 problems"
    assert failure_line(3, 137, tmp_path / "missing") == "rank 3 was killed by SIGKILL (exit code 137)"
