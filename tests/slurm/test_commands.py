"""status, logs, stop, cancel, resume and list on the real Slurm."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.runs import ROOT, Runs


def test_launch_says_what_comes_next(runs: Runs) -> None:
    result = runs.json(
        *("launch", runs.config, "--backend", "slurm", "--nodes", 2),
        *("--set", "slurm.sbatch_options={hold: true}"),
    )
    run = runs.folder / "runs" / "run"
    assert result == {"run": str(run), "job": result["job"], "code": 0}
    assert runs.cluster.state(result["job"]) == "PENDING"
    state = runs.json("status", run)
    assert (state["state"], state["job"]) == ("queued", result["job"])
    assert "held" in state["detail"]
    assert "taken out of the queue" in runs.alignkd("stop", run)
    assert runs.wait_for_end(result["job"]) == "CANCELLED"
    assert runs.json("status", run)["state"] == "not started"


def test_a_planned_stop_saves_and_resume_continues(runs: Runs) -> None:
    run = runs.prepare(steps=60, every=1000, hold=[5])
    text = runs.alignkd("resume", run)
    job = text.partition("submitted job ")[2].partition(";")[0]
    runs.wait_for_step(run, 5)
    state = runs.json("status", run)
    assert (state["state"], state["detail"], state["job"], state["total_steps"]) == (
        *("running", "training", job),
        60,
    )
    assert state["seconds_left"] > 0
    assert "is running already" in runs.alignkd("resume", run, code=2)
    assert runs.json("stop", run) == {"run": str(run), "job": job, "action": "asked to save and stop"}
    assert runs.wait_for_end(job) == "FAILED"  # exit code 85: what waits for this job must not start
    (attempt,) = runs.attempts(run)
    assert (attempt.reason, attempt.lost_steps) == ("stopped", 0)
    state = runs.json("status", run)
    assert (state["state"], state["next"]) == ("stopped", f"alignkd resume {run}")
    assert "nothing to stop" in runs.alignkd("stop", run, code=2)
    again = runs.json("resume", run)["job"]
    assert again != job
    assert runs.wait_for_end(again) == "COMPLETED", runs.log(run)
    assert runs.attempts(run)[1].first_step == attempt.saved_step
    state = runs.json("status", run)
    assert (state["state"], state["attempts"], state["lost_steps"], state["step"]) == ("done", 2, 0, 60)
    assert 0 < state["goodput"] <= 1


def test_a_cancelled_run_stays_cancelled(runs: Runs) -> None:
    run = runs.prepare(hold=[2])
    job = runs.submit(run)
    runs.wait_for_step(run, 2)
    assert "cancelled" in runs.alignkd("cancel", run)
    assert runs.wait_for_end(job) == "CANCELLED"
    assert runs.json("status", run)["state"] == "cancelled"


def test_node_counts_that_do_not_fit_are_refused(runs: Runs) -> None:
    run = runs.prepare(nodes=2)
    assert "node counts that fit with 1 rank each: 1, 2, 4, 8" in runs.alignkd(
        "resume", run, "--nodes", 3, code=2
    )
    assert not (run / "attempts.jsonl").exists()


def test_a_crash_is_explained(runs: Runs) -> None:
    run = runs.prepare(
        nodes=1,  # of several, one alone that reports bad input would be replaced
        gpus_per_node=2,
        steps=20,
        failures=[
            {"attempt": 1, "rank": 1, "step": 6, "code": 3},
            {"attempt": 2, "rank": 0, "step": 7, "code": 2},
        ],
    )
    job = runs.submit(run)
    assert runs.wait_for_end(job) == "FAILED"
    state = runs.json("status", run)
    assert state["state"] == "failed"
    assert state["detail"] == "configuration error: rank 0 ended with exit code 2: sample a: no such image"
    assert state["next"] == f"alignkd logs {run} --errors"
    error = runs.json("logs", run, "--errors")
    assert (error["attempt"], error["rank"], error["lines"]) == (2, 0, ["sample a: no such image"])
    shown = runs.alignkd("logs", run, "--errors", "--attempt", 1)
    assert "rank 1 failed first, with exit code 3" in shown
    assert "out of cheese at step 6" in shown
    assert "from step 0" not in runs.alignkd("logs", run)
    assert "rank 0 of 2 starts at step 0" in runs.alignkd("logs", run, "--attempt", 1)
    assert "rank 0 of 2 starts at step 5" in runs.alignkd("logs", run, "--attempt", 2)
    assert runs.json("logs", run, "--rank", 1)["lines"][0].startswith("=== attempt 2: ")
    assert "it has: 1, 2" in runs.alignkd("logs", run, "--attempt", 7, code=2)
    assert "ranks 0 to 1" in runs.alignkd("logs", run, "--rank", 9, code=2)
    assert "works with --rank only" in runs.alignkd("logs", run, "-f", "--errors", code=2)


def test_following_a_log_ends_with_the_run(runs: Runs) -> None:
    run = runs.prepare(steps=15)
    runs.submit(run)
    assert "rank 0 of 2 starts at step 0" in runs.alignkd("logs", run, "-f")
    assert runs.reasons(run) == ["done"]


def test_status_without_slurm_reads_the_folder(runs: Runs) -> None:
    run = runs.prepare(hold=[3])
    runs.submit(run)
    runs.wait_for_step(run, 3)
    elsewhere = {"PATH": str(Path(sys.executable).parent)}  # a machine without Slurm
    state = runs.json("status", run, **elsewhere)
    assert (state["state"], state["detail"]) == ("running", "training; Slurm does not answer here")
    assert "login node" in runs.alignkd("stop", run, code=2, **elsewhere)


@pytest.mark.parametrize("name", ["with 'space'", "$(touch x)\\ä"])
def test_all_commands_take_any_folder_name(runs: Runs, name: str) -> None:
    run = runs.prepare(folder=name, hold=[2])
    job = runs.submit(run)
    runs.wait_for_step(run, 2)
    assert runs.json("status", run)["job"] == job
    assert "starts at step 0" in runs.alignkd("logs", run)
    (state,) = runs.json("list", run.parent)
    assert (state["run"], state["state"]) == (str(run), "running")
    assert runs.json("stop", run)["job"] == job
    assert runs.wait_for_end(job) == "FAILED"
    assert runs.reasons(run) == ["stopped"]


def test_list_shows_every_run_of_a_folder(runs: Runs) -> None:
    first, second = runs.prepare("first", steps=2), runs.prepare("second")
    assert runs.wait_for_end(runs.submit(first)) == "COMPLETED"
    assert [(s["run"], s["state"]) for s in runs.json("list", first.parent)] == [
        (str(first), "done"),
        (str(second), "not started"),
    ]
    text = runs.alignkd("list", first.parent)
    assert "2 of 2" in text
    assert runs.alignkd("status", cwd=runs.folder).count("first") >= 1
    assert "no such folder" in runs.alignkd("list", runs.folder / "missing", code=2)


def test_a_job_submitted_from_inside_a_job_keeps_its_own_options(runs: Runs, cluster: Cluster) -> None:
    """SLURM_* and SBATCH_* of the outer job must not become options of the new one; a site's default for an
    option that the run leaves open (here the partition) holds in a job as in a login shell."""
    run = runs.prepare(steps=3, slurm={"time_limit": "00:09:00"})
    script = runs.folder / "outer.sh"
    script.write_text(
        "#!/bin/bash\nexport SBATCH_JOB_NAME=outer SBATCH_TIMELIMIT=3 SBATCH_NO_REQUEUE=1 ALIGNKD_ATTEMPT=9\n"
        "export SBATCH_PARTITION=high\n"
        f"cd {ROOT} && {sys.executable} -m launcher.cli resume {run} > {runs.folder}/out 2>&1\n"
    )
    outer = cluster.run("sbatch", "--parsable", "--output=/dev/null", "--nodes=1", "--exclusive", str(script))
    assert runs.wait_for_end(outer) == "COMPLETED", (runs.folder / "out").read_text()
    job = (runs.folder / "out").read_text().partition("submitted job ")[2].partition(";")[0]
    assert runs.wait_for_end(job) == "COMPLETED", runs.log(run)
    facts = cluster.job(job)
    assert (facts["JobName"], facts["Requeue"], facts["Partition"]) == (run.name, "1", "high")
    assert facts["TimeLimit"] == "00:09:00"
    assert [attempt.job for attempt in runs.attempts(run)] == [job]


@pytest.mark.parametrize(("count", "nodes"), [(2, "n[1-2]"), (3, "n1,n2")])
def test_launch_uses_the_allocation_that_it_runs_in(
    runs: Runs, cluster: Cluster, count: int, nodes: str
) -> None:
    """Of one that is larger, the first nodes."""
    run = runs.prepare(steps=3)
    command = f"cd {ROOT} && {sys.executable} -m launcher.cli resume {run}"
    done = subprocess.run(
        ["salloc", f"--nodes={count}", "--exclusive", "bash", "-c", command],
        env=cluster.environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "using the allocation" in done.stdout
    (attempt,) = runs.attempts(run)
    assert (attempt.reason, attempt.nodes) == ("done", nodes)
    assert runs.wait_for_end(attempt.job) == "COMPLETED"  # salloc does not wait for it


def test_stop_and_cancel_reach_a_run_in_an_allocation(runs: Runs, cluster: Cluster) -> None:
    """Typed in another terminal. The allocation itself, its shell and its other steps are left alone."""
    run = runs.prepare(hold=[3, 5])
    other = runs.folder / "other"  # another step of the user's; what it hears
    script = (
        f"trap 'echo USR1 >> {other}' USR1; trap 'echo TERM >> {other}' TERM; while :; do sleep 0.2; done"
    )
    resume = f"{sys.executable} -m launcher.cli resume {run}"
    shell = (
        f"cd {ROOT}; srun --overlap --mpi=none -N1 -n1 bash -c {shlex.quote(script)} & "
        f"{resume}; echo code $?; {resume}; echo code $?; kill -KILL %1; wait"
    )
    process = subprocess.Popen(
        ["salloc", "--nodes=2", "--exclusive", "bash", "-c", shell],
        env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    runs.wait_for_step(run, 3)
    state = runs.json("status", run)
    assert (state["state"], state["detail"]) == ("running", "training")
    stopped = runs.json("stop", run)
    assert (stopped["job"], stopped["action"]) == (state["job"], "asked to save and stop")
    runs.wait_for_step(run, 5)  # of the second start
    assert runs.json("cancel", run)["action"] == "asked the ranks to save and exit; the allocation is kept"
    output = process.communicate(timeout=400)[0]
    assert [line for line in output.splitlines() if line.startswith("code ")] == ["code 85", "code 86"], (
        output
    )
    assert runs.reasons(run) == ["stopped", "cancelled"]
    first, second = runs.attempts(run)
    assert (first.saved_step, first.lost_steps, second.first_step, second.lost_steps) == (3, 0, 3, 0)
    assert first.job == second.job == state["job"]
    assert not other.exists()
    assert "nothing to stop" in runs.alignkd("stop", run, code=2)


def test_a_stop_counts_before_the_ranks_can_receive_a_signal(runs: Runs) -> None:
    """The job runs, and has no step yet that a signal could reach."""
    wait = 'touch "$RUN/begins"; while [[ -e $RUN/slow ]]; do sleep 0.1; done'
    site = runs.site({})
    run = runs.prepare(hold=[3], slurm={"activate": f"{site['activate']}; {wait}"})
    (run / "slow").touch()
    job = runs.submit(run)
    wait_for((run / "begins").exists, "the script")
    assert runs.json("stop", run)["action"] == "asked to save and stop"
    (run / "slow").unlink()
    assert runs.wait_for_end(job) == "FAILED"
    assert runs.cluster.job(job)["ExitCode"] == "85:0"
    assert runs.attempts(run) == []


def test_stop_and_cancel_reach_a_run_of_the_local_back_end(runs: Runs, tmp_path: Path) -> None:
    run = runs.prepare()
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "backend": "local"}))
    for command, code in (("stop", 85), ("cancel", 86)):
        program = f"import sys; sys.argv[1:] = ['resume', {str(run)!r}]\n" + LOCAL
        process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env={**os.environ})
        wait_for((run / "ready").exists, "the ranks")
        assert runs.json("status", run)["state"] == "running"
        runs.alignkd(command, run)
        assert process.wait(400) == code
        (run / "ready").unlink()
    assert "nothing to stop" in runs.alignkd("stop", run, code=2)


LOCAL = f"""
from launcher.backends import local
rank = '''
import pathlib, signal, sys, time
for number, code in (({int(signal.SIGUSR1)}, 85), ({int(signal.SIGTERM)}, 86)):
    signal.signal(number, lambda *_, code=code: sys.exit(code))
pathlib.Path(sys.argv[1], "ready").touch()
time.sleep(600)
'''
local.rank_command = lambda run, _python: [sys.executable, "-c", rank, str(run)]
from launcher.cli.app import main
main()
"""
