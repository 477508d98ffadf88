"""Commands on existing runs and on scripts, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from alignkd.run_folder.atomic_files import write_json
from alignkd.run_folder.paths import RunPaths
from launcher.backends.base import JobEnd
from launcher.backends.slurm import backend as slurm
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
    assert values == {
        "attempt": 1,
        "rank": 1,
        "exit_code": 2,
        "lines": ["no such image"],
        "job": None,
        "cause": None,
        "log": str(failed_run / "logs" / "rank-1.log"),
    }
    assert alignkd("logs", failed_run, "--errors", "--attempt", 2).stdout == "attempt 2 has not failed\n"


def test_logs_errors_of_a_run_that_has_not_failed_says_so(make_run) -> None:
    run, _ = make_run()
    assert alignkd("logs", run, "--errors").stdout == "no attempt has failed\n"
    assert alignkd("logs", run, "--errors", "--json").stdout == "null\n"


@pytest.fixture
def slurm_run(make_run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Job 42 was submitted, and Slurm has forgotten it."""
    run: Path = make_run(backend="slurm")[0]
    monkeypatch.setattr(slurm, "own_jobs", list)
    monkeypatch.setattr(slurm, "job_end", lambda _job: None)
    write_json(RunPaths(run).job, {"job": "42", "attempts_before": 0})
    return run


def test_a_job_that_failed_before_an_attempt_is_shown_by_status_and_logs(slurm_run: Path) -> None:
    said = "/spool/slurm_script: line 27: /x/python: No such file or directory"
    RunPaths(slurm_run).job_log("42").write_text(said + "\n")
    state = json.loads(alignkd("status", slurm_run, "--json").stdout)
    assert (state["state"], state["job"]) == ("failed", "42")
    assert state["detail"] == (
        "job 42 ended before an attempt began: the job script failed: /x/python: No such file or directory"
    )
    assert state["next"] == f"alignkd logs {slurm_run} --errors"
    shown = alignkd("logs", slurm_run, "--errors").stdout
    assert shown.startswith("job 42 ended before an attempt began; the end of ")
    assert f"  | {said}\ncause: the job script failed: /x/python" in shown
    assert alignkd("logs", slurm_run, "--job").stdout == said + "\n"
    assert json.loads(alignkd("logs", slurm_run, "--job", "--json").stdout) == {"job": "42", "lines": [said]}
    assert "see what job 42 said with --job" in alignkd("logs", slurm_run).stderr


def test_an_attempt_without_ranks_is_explained_by_srun(slurm_run: Path) -> None:
    begin_line = "alignkd: attempt 1 on n1, from step 0"
    RunPaths(slurm_run).job_log("42").write_text(f"{begin_line}\nsrun: error: Invalid node name specified\n")
    close(slurm_run, begin(slurm_run, "42", "n1", None), Reason.CRASHED)
    state = json.loads(alignkd("status", slurm_run, "--json").stdout)
    assert state["detail"] == "crashed: srun: Invalid node name specified"
    shown = alignkd("logs", slurm_run, "--errors").stdout
    assert shown.startswith("attempt 1: no rank recorded an exit; the end of ")
    assert "cause: srun: Invalid node name specified" in shown
    assert alignkd("logs", slurm_run, "--job", "--attempt", 1).stdout.startswith(begin_line)
    missing = alignkd("logs", slurm_run, "--job", "--attempt", 2)
    assert "no job of attempt 2 has left a log" in missing.stderr


def test_an_oom_kill_is_named_beside_the_rank(slurm_run: Path) -> None:
    RunPaths(slurm_run).job_log("42").write_text(
        "alignkd: attempt 1 on n1, from step 0\nsrun: error: n1: task 0: Out Of Memory\n"
    )
    (slurm_run / "logs" / "rank-0.log").write_text("=== attempt 1: here\nworking\n")
    close(slurm_run, begin(slurm_run, "42", "n1", None), Reason.CRASHED, codes={0: 137})
    state = json.loads(alignkd("status", slurm_run, "--json").stdout)
    assert state["detail"].startswith("crashed: rank 0 was killed by SIGKILL (exit code 137): working; ")
    assert "killed for lack of host memory on n1; request more with slurm.memory" in state["detail"]
    assert "cause: killed for lack of host memory on n1" in alignkd("logs", slurm_run, "--errors").stdout


@pytest.mark.parametrize(
    ("end", "state", "detail"),
    [
        (None, "lost", "job 42 left no log: its node does not see the run folder, or it was cancelled"),
        (JobEnd("CANCELLED", None), "cancelled", "job 42, before it started"),
        (
            JobEnd("FAILED", "n2 cannot write"),
            "failed",
            "job 42 ended as FAILED without a log: n2 cannot write",
        ),
    ],
)
def test_a_job_without_a_log_is_not_a_run_that_was_not_started(
    slurm_run: Path, monkeypatch: pytest.MonkeyPatch, end: JobEnd | None, state: str, detail: str
) -> None:
    monkeypatch.setattr(slurm, "job_end", lambda _job: end)
    values = json.loads(alignkd("status", slurm_run, "--json").stdout)
    assert (values["state"], values["detail"], values["job"]) == (state, detail, "42")


def test_a_job_that_was_stopped_before_it_started_has_not_failed(slurm_run: Path) -> None:
    said = "alignkd: stopped before it started; continue with `alignkd resume`\n"
    RunPaths(slurm_run).job_log("42").write_text(said)
    values = json.loads(alignkd("status", slurm_run, "--json").stdout)
    assert (values["state"], values["detail"]) == ("stopped", "job 42, before it started")
    assert alignkd("logs", slurm_run, "--errors").stdout == "no attempt has failed\n"


def test_only_slurm_runs_have_a_job_log(failed_run: Path) -> None:
    assert "no job of this run has left a log" in alignkd("logs", failed_run, "--job").stderr
    both = alignkd("logs", failed_run, "--job", "--errors")
    assert "--errors and --job: give only one" in both.stderr


@pytest.mark.parametrize("option", [("--errors",), ("--job",), ("--json",), ("--attempt", "1")])
def test_follow_works_with_a_rank_only(failed_run: Path, option: tuple[str, ...]) -> None:
    done = alignkd("logs", failed_run, "--follow", *option)
    assert done.exit_code == 2
    assert "--follow works with --rank only" in done.stderr


def test_status_and_list_print_the_same_states_as_json(failed_run: Path) -> None:
    state = json.loads(alignkd("status", failed_run, "--json").stdout)
    assert (state["run"], state["state"]) == (str(failed_run), "failed")
    assert json.loads(alignkd("list", failed_run.parent, "--json").stdout) == [state]


def test_an_empty_folder_has_no_runs(tmp_path: Path) -> None:
    assert alignkd("list", tmp_path).stdout == f"no runs yet in {tmp_path}; start one with: alignkd launch\n"
    missing = alignkd("list", tmp_path / "missing")
    assert missing.exit_code == 2
    assert "no such folder" in missing.stderr


def test_a_run_that_does_not_run_cannot_be_stopped(failed_run: Path) -> None:
    for command in ("stop", "cancel"):
        done = alignkd(command, failed_run)
        assert done.exit_code == 2
        assert f"{failed_run} is failed; there is nothing to stop" in done.stderr


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
