"""Commands on existing runs and on scripts, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from alignkd.errors import UserError
from launcher.cli.app import app
from launcher.run.attempts import Reason, begin, close


def alignkd(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def failed_run(make_run) -> Path:
    run: Path = make_run()[0]
    (run / "logs" / "rank-0.log").write_text("=== attempt 1: here\nworking\n")
    (run / "logs" / "rank-1.log").write_text("=== attempt 1: here\nalignkd: error: no such image\n")
    close(run, begin(run, "local", "here", None), Reason.BAD_INPUT, codes={1: 2, 0: -15})
    return run


def test_logs_shows_the_log_of_a_rank(failed_run: Path) -> None:
    assert alignkd("logs", failed_run).stdout == "=== attempt 1: here\nworking\n"
    shown = json.loads(alignkd("logs", failed_run, "--rank", 1, "--json").stdout)
    assert shown == {"rank": 1, "lines": ["=== attempt 1: here", "alignkd: error: no such image"]}


def test_logs_errors_shows_the_error_of_the_rank_that_failed_first(failed_run: Path) -> None:
    shown = alignkd("logs", failed_run, "--errors").stdout
    assert shown == "attempt 1: rank 1 failed first, with exit code 2\n  | no such image\n"
    values = json.loads(alignkd("logs", failed_run, "--errors", "--json").stdout)
    assert values == {"attempt": 1, "rank": 1, "exit_code": 2, "lines": ["no such image"]}
    assert alignkd("logs", failed_run, "--errors", "--attempt", 2).stdout == "attempt 2 has not failed\n"


def test_logs_errors_of_a_run_that_has_not_failed_says_so(make_run) -> None:
    run, _ = make_run()
    assert alignkd("logs", run, "--errors").stdout == "no attempt has failed\n"
    assert alignkd("logs", run, "--errors", "--json").stdout == "null\n"


@pytest.mark.parametrize("option", [("--errors",), ("--json",), ("--attempt", "1")])
def test_follow_works_with_a_rank_only(failed_run: Path, option: tuple[str, ...]) -> None:
    done = alignkd("logs", failed_run, "--follow", *option)
    assert isinstance(done.exception, UserError)
    assert "--follow works with --rank only" in str(done.exception)


def test_status_and_list_print_the_same_states_as_json(failed_run: Path) -> None:
    state = json.loads(alignkd("status", failed_run, "--json").stdout)
    assert (state["run"], state["state"]) == (str(failed_run), "failed")
    assert json.loads(alignkd("list", failed_run.parent, "--json").stdout) == [state]


def test_an_empty_folder_has_no_runs(tmp_path: Path) -> None:
    assert alignkd("list", tmp_path).stdout == f"no runs in {tmp_path}\n"
    missing = alignkd("list", tmp_path / "missing")
    assert isinstance(missing.exception, UserError)
    assert "no such folder" in str(missing.exception)


def test_a_run_that_does_not_run_cannot_be_stopped(failed_run: Path) -> None:
    for command in ("stop", "cancel"):
        done = alignkd(command, failed_run)
        assert isinstance(done.exception, UserError)
        assert f"{failed_run} is failed; there is nothing to stop" in str(done.exception)


def test_explain_shows_each_pitfall_and_exits_with_1(tmp_path: Path) -> None:
    script = tmp_path / "job"
    script.write_text("#!/bin/bash\n#SBATCH --requeue\ndeepspeed train.py\n")
    done = alignkd("explain", script)
    assert done.exit_code == 1
    assert done.stdout.startswith("line 3: deepspeed train.py\n  the deepspeed launcher exits with 0")
    values = alignkd("explain", script, "--json")
    assert (values.exit_code, json.loads(values.stdout)[0]["line"]) == (1, 3)
    script.write_text("#!/bin/bash\n#SBATCH --requeue\nsrun --kill-on-bad-exit=1 x\n")
    good = alignkd("explain", script)
    assert (good.exit_code, good.stdout) == (0, "no known pitfall found\n")
