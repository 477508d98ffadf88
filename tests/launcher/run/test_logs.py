import json
from dataclasses import asdict
from pathlib import Path

import pytest

from alignkd.errors import UserError
from alignkd.run_folder.paths import RunPaths
from launcher.run.attempts import Attempt, Reason, begin, close
from launcher.run.hangs import Hang, hang_codes, write_hang
from launcher.run.lock import only_launcher
from launcher.run.logs import attempt_lines, first_error, follow, is_over

LOG = "=== attempt 1: job 5 on n1\nfirst\n=== attempt 3: job 5 on n2\nthird\n\x1b[31mred\n"


@pytest.fixture
def run(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-0.log").write_text(LOG)
    return tmp_path


def fail(run, number: int, rank: int, code: int) -> None:
    attempt = Attempt(number, "5", "n1", 0.0, 0, end=1.0, reason="crashed", failed_rank=rank, exit_code=code)
    with RunPaths(run).attempts.open("a") as file:
        file.write(json.dumps(asdict(attempt)) + "\n")


def test_each_attempt_has_its_own_lines(run) -> None:
    assert attempt_lines(run, 0, 1) == ["=== attempt 1: job 5 on n1", "first"]
    # Control characters must not reach the terminal.
    assert attempt_lines(run, 0, None) == ["=== attempt 3: job 5 on n2", "third", "?[31mred"]
    with pytest.raises(UserError, match="no attempt 2; it has: 1, 3"):
        attempt_lines(run, 0, 2)
    with pytest.raises(UserError, match="there are logs of rank 0 only"):
        attempt_lines(run, 1, None)
    (run / "logs" / "rank-1.log").write_text("of the local back end\n")
    assert attempt_lines(run, 1, None) == ["of the local back end"]
    with pytest.raises(UserError, match="no attempt 2: it holds one attempt only"):
        attempt_lines(run, 1, 2)


def test_a_run_without_logs_says_that_no_rank_has_started(tmp_path) -> None:
    with pytest.raises(UserError, match="no rank has started yet"):
        attempt_lines(tmp_path, 0, None)


def test_the_first_error_is_that_of_the_rank_to_blame(run) -> None:
    assert first_error(run, None) is None
    fail(run, 1, 0, 9)
    (run / "logs" / "rank-2.log").write_text(
        "=== attempt 3: job 5\nnoise\nalignkd: error: a: 2 problems\n  - x\n  - y\nmore noise\n"
    )
    fail(run, 3, 2, 2)
    error = first_error(run, None)
    assert error is not None
    assert (error.attempt, error.rank, error.exit_code) == (3, 2, 2)
    assert error.lines == ["a: 2 problems", "  - x", "  - y"]
    error = first_error(run, 1)
    assert error is not None
    assert error.lines[-1] == "first"
    assert first_error(run, 2) is None


def test_following_shows_new_lines_until_the_run_ends(run) -> None:
    steps = iter([False, False, True])

    def ended() -> bool:
        finished = next(steps)
        if not finished:
            with (run / "logs" / "rank-0.log").open("a") as file:
                file.write("new\n")
        return finished

    assert "".join(follow(run, 0, ended, seconds=0)).splitlines()[1:] == ["third", "?[31mred", "new", "new"]


def test_following_shows_every_line_once_and_complete(run) -> None:
    log = run / "logs" / "rank-0.log"
    log.write_text("=== attempt 1: job 5 on n1\nfirst\nhal")
    parts = iter(["f\nnext é", "\nlast"])

    def ended() -> bool:
        part = next(parts, None)
        with log.open("a") as file:
            file.write(part or "")
        return part is None

    found = []
    for line in follow(run, 0, ended, seconds=0):
        if not found:  # written while the reader is busy with the first lines
            with log.open("a") as file:
                file.write("busy, ")
        found.append(line)
    assert found[1:] == ["first\n", "halbusy, f\n", "next é\n", "last\n"]


def test_the_ssh_log_explains_a_rank_that_never_started(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "ssh-1.log").write_text("ssh: connect to host two: No route to host\n")
    close(tmp_path, begin(tmp_path, "ssh", "one,two", None), Reason.CRASHED, codes={1: 255, 0: -9})
    error = first_error(tmp_path, None)
    assert error is not None
    assert (error.rank, error.exit_code) == (1, 255)
    assert error.lines == ["ssh: connect to host two: No route to host"]


def test_a_hang_is_explained_by_the_log_of_the_rank_and_not_by_the_banner_of_ssh(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "ssh-1.log").write_text("Authorized users only\n")
    attempt = begin(tmp_path, "ssh", "one,two", None)
    (tmp_path / "logs" / "rank-1.log").write_text(
        "=== attempt 1: on two\nstep 7\nalignkd: error: rank 1 on two is behind\n"
    )
    hang = Hang((1,), ("two",), "rank 1 on two is behind")
    write_hang(tmp_path, hang)
    close(tmp_path, attempt, Reason.HUNG, hang.nodes, codes=hang_codes(hang))
    error = first_error(tmp_path, None)
    assert error is not None
    assert (error.rank, error.lines) == (1, ["rank 1 on two is behind"])
    # In the next attempt the connection may fail.
    close(tmp_path, begin(tmp_path, "ssh", "one,two", None), Reason.CRASHED, codes={1: 255})
    error = first_error(tmp_path, None)
    assert error is not None
    assert error.lines == ["Authorized users only"]


def test_following_a_log_that_never_appears_is_an_error(run) -> None:
    with pytest.raises(UserError, match=r"rank-7.log: no such log; there are logs of ranks? "):
        list(follow(run, 7, lambda: True, seconds=0))
    for log in (run / "logs").glob("rank-*.log"):
        log.unlink()
    with pytest.raises(UserError, match="no rank has started yet"):
        list(follow(run, 0, lambda: True, seconds=0))


def test_a_run_that_is_about_to_be_resumed_is_not_over(tmp_path: Path) -> None:
    """Its last attempt has ended well, and the next one is not open yet."""
    close(tmp_path, begin(tmp_path, "local", "here", None), Reason.STOPPED)
    assert is_over(tmp_path)
    with only_launcher(tmp_path):
        assert not is_over(tmp_path)
        begin(tmp_path, "local", "here", None)
    assert not is_over(tmp_path)
