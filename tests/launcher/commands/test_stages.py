import io
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from alignkd.errors import AlignkdError, UserError
from launcher.backends import local
from launcher.backends.base import QueuedJob
from launcher.backends.slurm import backend as slurm
from launcher.backends.slurm.client import jobs_of
from launcher.commands.launch import LaunchRequest, launch
from launcher.commands.resume import ResumeRequest, resume_run
from launcher.commands.stages import check_runs, link, stage_names


def test_stage_names_come_from_either_option() -> None:
    assert stage_names(None, None, None) == [None]
    assert stage_names("a", None, "x") == ["a"]
    assert stage_names(None, "a, b", None) == ["a", "b"]


@pytest.mark.parametrize(
    "arguments", [("a", "a,b", None), (None, "a,b", "x"), (None, ",", None), (None, "a,a", None)]
)
def test_options_that_contradict_each_other_are_refused(arguments) -> None:
    with pytest.raises(UserError, match="stage"):
        stage_names(*arguments)


def test_two_stages_may_not_share_a_run_folder() -> None:
    check_runs(["a", "b"], [Path("/r/a"), Path("/r/b")])
    with pytest.raises(UserError, match="stages a and c have the same run"):
        check_runs(["a", "b", "c"], [Path("/r/a"), Path("/r/b"), Path("/r/a")])


def test_both_run_folders_record_that_one_stage_follows_the_other(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for run in (one, two):
        run.mkdir()
    link(one, two)
    assert json.loads((one / "next.json").read_text()) == {"run": str(two)}
    assert json.loads((two / "previous.json").read_text()) == {"run": str(one)}


RANK = """
import pathlib, sys
run = pathlib.Path(sys.argv[1])
with open(run.parent / "order", "a") as order:
    order.write(run.name + " ")
sys.exit(int((run.parent / f"code-{run.name}").read_text()))
"""


def test_on_the_local_back_end_a_failed_stage_keeps_the_next_from_starting(config_file, monkeypatch) -> None:
    stages = "".join(f"  {n}: {{run: {{name: {n}}}}}\n" for n in ("a", "b", "c"))
    config_file.write_text(config_file.read_text() + "stages:\n" + stages)
    runs = config_file.parent / "runs"
    runs.mkdir()
    for name, code in {"a": 0, "b": 3, "c": 0}.items():
        (runs / f"code-{name}").write_text(str(code))
    monkeypatch.setattr(local, "rank_command", lambda run, _python: [sys.executable, "-c", RANK, str(run)])
    console = Console(file=io.StringIO())
    result = launch(LaunchRequest(config_file, backend="local", stages="a,b,c"), console)
    assert result["code"] == 3
    assert [(Path(stage["run"]).name, stage["code"]) for stage in result["stages"]] == [("a", 0), ("b", 3)]
    assert (runs / "order").read_text() == "a b "
    assert (runs / "c" / "manifest.json").exists()
    (runs / "code-b").write_text("0")
    assert [resume_run(runs / name, ResumeRequest(), console)["code"] for name in ("b", "c")] == [0, 0]
    assert (runs / "order").read_text() == "a b b c "


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> list[QueuedJob]:
    """In place of Slurm, which accepts every job."""
    jobs: list[QueuedJob] = []

    def submit(run: Path, options: Sequence[str] = ()) -> str:
        jobs.append(QueuedJob(str(len(jobs) + 9), "PENDING", " ".join(options), None, f"{run}/job.sbatch"))
        return jobs[-1].id

    monkeypatch.setattr(slurm, "in_allocation", lambda: False)
    monkeypatch.setattr(slurm.SlurmBackend, "preflight", lambda *_: ([], []))
    monkeypatch.setattr(slurm, "submit", submit)
    monkeypatch.setattr(slurm, "own_jobs", lambda: jobs)
    monkeypatch.setattr(slurm, "queued_jobs", lambda run: jobs_of(run, jobs))
    monkeypatch.setattr(slurm, "retarget_dependency", lambda *_: True)
    return jobs


WAITS = "--dependency=afterok:{} --kill-on-invalid-dep=no"


def test_a_refused_second_stage_keeps_the_first_job_and_waits_for_its_newest_when_it_is_resumed(
    config_file: Path, queue: list[QueuedJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file.write_text(
        config_file.read_text() + "stages: {a: {run: {name: a}}, b: {run: {name: b}}, c: {run: {name: c}}}\n"
    )
    accept, console = slurm.submit, Console(file=io.StringIO())

    def refuse_the_second(run: Path, options: Sequence[str] = ()) -> str:
        if options:
            raise AlignkdError("job limit reached")
        return accept(run, options)

    monkeypatch.setattr(slurm, "submit", refuse_the_second)
    result = launch(LaunchRequest(config_file, backend="slurm", stages="a,b,c"), console)
    (one, two), runs = result["stages"], config_file.parent / "runs"
    assert (one["job"], one["code"], two["job"], two["error"], result["code"]) == (
        *("9", 0, None, "job limit reached"),
        1,
    )
    monkeypatch.setattr(slurm, "submit", accept)
    # The run is just being continued: its script has submitted job 10, and ends without the result.
    queue[0] = replace(queue[0], state="RUNNING")
    accept(runs / "a")
    assert resume_run(runs / "b", ResumeRequest(), console)["job"] == "11"
    assert queue[-1].reason == WAITS.format(10)
    assert resume_run(runs / "c", ResumeRequest(), console)["job"] == "12"
    assert queue[-1].reason == WAITS.format(11)


def test_a_stage_is_resumed_only_when_the_one_before_it_is_done_or_on_its_way(
    config_file: Path, queue: list[QueuedJob]
) -> None:
    config_file.write_text(config_file.read_text() + "stages: {a: {run: {name: a}}, b: {run: {name: b}}}\n")
    console = Console(file=io.StringIO())
    launch(LaunchRequest(config_file, backend="slurm", stages="a,b"), console)
    runs = config_file.parent / "runs"
    assert [job.reason for job in queue] == [
        "",
        WAITS.format(9),
    ]  # Slurm does not cancel it, whatever happens to 9
    queue.clear()
    with pytest.raises(UserError, match=f"neither done nor queued; first: alignkd resume {runs}/a"):
        resume_run(runs / "b", ResumeRequest(), console)
    (runs / "a" / "result.json").write_text('{"status": "done"}')
    resume_run(runs / "b", ResumeRequest(), console)
    assert [job.reason for job in queue] == [""]
