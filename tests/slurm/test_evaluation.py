"""Evaluations as jobs: the ranks are real, on the CPUs of two nodes."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.evaluate.questions import QUESTIONS, write_questions
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.runs import Runs


@pytest.fixture
def ask(runs: Runs) -> tuple[object, ...]:
    """``eval`` of the fixture's student on two nodes, with a site profile for this cluster."""
    data = runs.folder / "data"
    write_questions(data / "own.json", ["a"] * len(QUESTIONS))
    profile = runs.folder / "site" / "alignkd" / "site.yaml"
    profile.parent.mkdir(parents=True)
    profile.write_text(json.dumps({"slurm": {"export": {"ALIGNKD_MASTER_ADDR": "127.0.0.1"}}}))
    own = ("--task", "own", "--questions", "own.json", "--image-folder", tiny.FOLDER)
    out = runs.folder / "it's here"
    return ("eval", tiny.STUDENT, *own, "--data", data, "--out", out, "--batch-size", 2, "--device", "cpu")


def site(runs: Runs) -> dict[str, str]:
    return {"XDG_CONFIG_HOME": str(runs.folder / "site")}


def test_an_evaluation_runs_on_two_nodes_and_resumes(runs: Runs, cluster: Cluster, ask) -> None:
    submitted = runs.json(*ask, "--nodes", 2, "--time", "10", **site(runs))
    out, job = Path(submitted["out"]), submitted["job"]
    again = runs.alignkd(*ask, "--nodes", 2, code=2, **site(runs))
    assert f"job {job} is" in again  # two would write the same answers
    assert cluster.job(job)["TimeLimit"] == "00:10:00"
    assert runs.wait_for_end(job) == "COMPLETED", runs.log(out)
    answers = out / "student" / "own.jsonl"
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [str(number) for number in range(len(QUESTIONS))]
    report = json.loads(Path(submitted["scores"]).read_text())
    assert report["models"]["student"]["tasks"]["own"]["questions"] == len(QUESTIONS)
    assert "Scores ± standard error" in (out / "logs" / "rank-0.log").read_text()
    nodes = {(out / "logs" / f"rank-{rank}.log").read_text().split()[4] for rank in (0, 1)}
    assert len(nodes) == 2

    written = answers.stat().st_mtime_ns
    Path(submitted["scores"]).unlink()
    resumed = runs.json(*ask, "--nodes", 1, **site(runs))["job"]
    assert runs.wait_for_end(resumed) == "COMPLETED", runs.log(out)
    assert json.loads(Path(submitted["scores"]).read_text()) == report
    assert answers.stat().st_mtime_ns == written  # nothing was asked again


def test_a_job_that_slurm_refuses_is_one_error(runs: Runs, cluster: Cluster, ask) -> None:
    for arguments, message in (
        (("--nodes", 9), "--nodes 9: the partition has 4 nodes"),
        (("--nodes", 1, "--partition", "nope"), "sbatch refuses the job"),
        (("--nodes", 1, "--time", "soon"), "--time soon: not valid; valid: [days-]hours:minutes:seconds"),
    ):
        text = runs.alignkd(*ask, *arguments, code=2, **site(runs))
        assert message in text
        assert "Traceback" not in text
    assert not (runs.folder / "it's here").exists()
    assert cluster.run("squeue", "-h") == ""


def test_a_job_for_gpus_never_falls_back_to_the_cpu(runs: Runs, cluster: Cluster, ask) -> None:
    """The cluster's GPUs are pretended. On the right node the same command would resume."""
    submitted = runs.json(*ask[:-2], "--nodes", 1, **site(runs))
    assert "TresPerNode=gres:gpu:1" in cluster.run("scontrol", "show", "job", "-o", submitted["job"])
    assert runs.wait_for_end(submitted["job"]) == "FAILED"
    assert cluster.job(submitted["job"])["ExitCode"] == "88:0"
    assert "sees no GPU" in (Path(submitted["out"]) / "logs" / "rank-0.log").read_text()
    assert "the evaluation ended with exit code 88" in Path(submitted["log"]).read_text()


def launch_with_evaluation(runs: Runs) -> dict[str, Any]:
    """A run on two nodes that may not be requeued, and the evaluation after it; both jobs are held."""
    write_questions(runs.folder / "data" / "sample" / "test.json", ["a"] * len(QUESTIONS))
    (runs.folder / "data" / "sample" / "images").symlink_to(tiny.FOLDER)
    settings = runs.site({"requeue": False, "sbatch_options": {"hold": True}})
    launched: dict[str, Any] = runs.json(
        *(
            "launch",
            runs.config,
            "--backend",
            "slurm",
            "--nodes",
            2,
            "--set",
            f"slurm={json.dumps(settings)}",
        ),
        *("--then-eval", "sample", "--eval-data", runs.folder / "data"),
    )
    return launched


def test_a_cancelled_run_takes_its_waiting_evaluation_along(runs: Runs, cluster: Cluster) -> None:
    launched = launch_with_evaluation(runs)
    run, first, waiting = launched["run"], launched["job"], launched["evaluation"]["job"]
    answer = runs.alignkd("cancel", run)
    later = re.search(r"its evaluation, job (\d+) \(when the run is done: (sbatch .*)\)", answer)
    assert later is not None, answer
    assert later[1] == waiting
    assert [cluster.state(job) for job in (first, waiting)] == ["CANCELLED", "CANCELLED"]

    # What is said there submits it again. The run has no job by now, for which it could wait.
    (again,) = re.findall(r"\d+", cluster.run(*shlex.split(later[2])))
    assert cluster.state(again) == "PENDING"
    assert runs.json("cancel", run)["job"] == again
    assert cluster.state(again) == "CANCELLED"
    assert "there is nothing to stop" in runs.alignkd("cancel", run, code=2)


def test_an_evaluation_follows_the_last_job_of_a_run(runs: Runs, cluster: Cluster) -> None:
    """A second job continues the run after a crash."""
    launched = launch_with_evaluation(runs)
    run, evaluation = Path(launched["run"]), launched["evaluation"]
    assert evaluation["out"] == str(run / "eval")
    assert cluster.job(evaluation["job"])["Dependency"].startswith(f"afterok:{launched['job']}")
    assert cluster.job(evaluation["job"])["NumNodes"].startswith("1")
    runs.plan(run, steps=12, failures=[{"attempt": 1, "rank": 0, "step": 6, "code": 3}])
    (run / "student").symlink_to(tiny.STUDENT)  # the toy exports nothing
    script = run / "job.sbatch"
    script.write_text(script.read_text().replace("#SBATCH --hold\n", ""))
    for job in (launched["job"], evaluation["job"]):
        cluster.run("scontrol", "release", job)
    assert runs.wait_for_end(evaluation["job"]) == "COMPLETED", runs.log(run) + runs.log(run / "eval")
    first, second = runs.attempts(run)
    assert (first.reason, second.reason, first.job) == ("crashed", "done", launched["job"])
    assert second.job not in (first.job, evaluation["job"])
    scores = run / "eval" / "scores.json"
    assert json.loads(scores.read_text())["models"][run.name]["tasks"]["sample"]["questions"] == len(
        QUESTIONS
    )
    assert second.end is not None
    assert second.end < (run / "eval" / "logs" / "rank-0.log").stat().st_mtime


# Answers the first batch, then waits as long as the file given as its last argument is there.
SLOW_RANK = """
import os, sys, time
import alignkd.evaluate.answering as answering
from alignkd.evaluate.__main__ import main
requests, held = answering._requests, sys.argv.pop()
def slow(model, work, batch):
    while batch.start > 0 and os.path.exists(held):
        time.sleep(0.1)
    return requests(model, work, batch)
answering._requests = slow
sys.exit(main(sys.argv[1:]))
"""


def test_a_preempted_evaluation_comes_back_with_its_answers(runs: Runs, cluster: Cluster, ask) -> None:
    held, python, slow = (runs.folder / name for name in ("held", "python", "slow.py"))
    held.touch()
    slow.write_text(SLOW_RANK)
    python.write_text(f'#!/bin/bash\nexec {sys.executable} {slow} "$3" {held}\n')
    python.chmod(0o755)
    profile = runs.folder / "site" / "alignkd" / "site.yaml"
    profile.write_text(json.dumps({"slurm": {"activate": f"export PYTHON={python}", "partition": "brief"}}))
    submitted = runs.json(*ask, "--nodes", 1, **site(runs))
    part = Path(submitted["out"]) / "student" / "own.part-0.jsonl"
    wait_for(lambda: part.exists() and part.stat().st_size, "the first answers")
    before = part.read_bytes()
    cluster.preempt()
    wait_for(lambda: cluster.job(submitted["job"])["Restarts"] == "1", "the preemption")
    assert part.read_bytes() == before
    held.unlink()
    assert runs.wait_for_end(submitted["job"]) == "COMPLETED", runs.log(Path(submitted["out"]))
    answers = (part.parent / "own.jsonl").read_bytes()
    assert answers.startswith(before)
    assert answers.count(b"\n") == len(QUESTIONS)
