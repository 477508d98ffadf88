"""What a Slurm job's log says about failures that no rank could log. tests/slurm has real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignkd.run_folder.atomic_files import write_json
from alignkd.run_folder.paths import RunPaths
from launcher.run.attempts import Reason, begin, close, read_history
from launcher.run.job_log import cause_of, job_lines, job_without_attempt, newest_job, out_of_memory

SCRIPT = "/var/spool/slurmd/job00042/slurm_script"
# As Slurm 23.11 and 22.05 say it.
KILLED = [
    "slurmstepd: error: Detected 1 oom_kill event in StepId=42.0. Some of the step tasks have been OOM "
    "Killed.",
    "slurmstepd: error: Detected 2 oom-kill event(s) in StepId=42.0. Some of your processes may have been "
    "killed by the cgroup out-of-memory handler.",
    "srun: error: n2: task 3: Out Of Memory",
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder with a logs folder, and a home of its own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in (tmp_path / "home", RunPaths(tmp_path / "run").logs):
        folder.mkdir(parents=True)
    return tmp_path / "run"


@pytest.mark.parametrize("line", KILLED)
def test_an_oom_kill_is_named_whatever_the_version(line: str) -> None:
    assert "killed for lack of host memory" in (out_of_memory(["srun: job 42 queued", line]) or "")


def test_an_oom_kill_names_its_nodes_and_a_remedy() -> None:
    lines = [KILLED[0], KILLED[2], "srun: error: n1: tasks 0,1: Out Of Memory"]
    assert cause_of(lines) == (
        "killed for lack of host memory on n1, n2; request more with slurm.memory, or lower data.workers"
    )


def test_the_memory_of_a_gpu_is_not_that_of_the_host() -> None:
    """The batch script quotes the failed rank."""
    assert out_of_memory(["  | torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"]) is None


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (
            f"{SCRIPT}: line 27: /x/python: No such file or directory",
            "the job script failed: /x/python: No such file or directory",
        ),
        (
            "/runs/run/env.sh: line 5: module: command not found",
            "the job script failed: module: command not found",
        ),
        (
            "/usr/bin/python3: Error while finding module specification for 'launcher.backends.slurm.batch' "
            "(ModuleNotFoundError: No module named 'launcher')",
            "/usr/bin/python3 cannot import alignkd; see PYTHON in env.sh, or slurm.python",
        ),
        ("srun: error: Unable to create step for job 42: More processors requested than permitted", None),
        ("srun: fatal: Can not execute /x", None),
    ],
)
def test_the_cause_is_the_first_line_that_explains(line: str, cause: str | None) -> None:
    expected = cause or "srun: " + line.partition(": ")[2].partition(": ")[2]
    assert cause_of(["alignkd: attempt 1 on n1, from step 0", line, "srun: error: later"]) == expected
    assert cause_of(["alignkd: attempt 1 on n1, from step 0", "  | srun: error: quoted"]) is None


def test_a_requeued_job_has_the_lines_of_each_attempt(run: Path) -> None:
    text = "early\nalignkd: attempt 1 on n1, from step 0\none\nalignkd: attempt 2 on n2, from step 5\ntwo\n"
    RunPaths(run).job_log("42").write_text(text)
    assert job_lines(run, "42") == text.splitlines()
    assert job_lines(run, "42", 1) == ["alignkd: attempt 1 on n1, from step 0", "one"]
    assert job_lines(run, "42", 2)[-1] == "two"
    assert job_lines(run, "42", 3) == []
    assert job_lines(run, "43") == []
    assert newest_job(run) == "42"


def test_a_job_that_did_not_see_the_run_folder_wrote_to_the_home(run: Path) -> None:
    (run.parent / "home" / "alignkd-job-42.log").write_text("alignkd: n2 cannot write it\n")
    assert job_lines(run, "42") == ["alignkd: n2 cannot write it"]
    RunPaths(run).job_log("42").write_text("of this run\n")
    assert job_lines(run, "42") == ["of this run"]


def test_a_submitted_job_counts_until_it_has_begun_an_attempt(run: Path) -> None:
    assert job_without_attempt(run, []) is None
    write_json(RunPaths(run).job, {"job": "42", "attempts_before": 0})
    assert job_without_attempt(run, []) == "42"
    close(run, begin(run, "42", "n1", None), Reason.CRASHED)
    assert job_without_attempt(run, read_history(run)) is None
    write_json(RunPaths(run).job, {"job": "43", "attempts_before": 1})
    assert job_without_attempt(run, read_history(run)) == "43"
    write_json(RunPaths(run).job, {"job": "43", "attempts_before": 1, "cancelled": True})
    assert job_without_attempt(run, read_history(run)) is None
