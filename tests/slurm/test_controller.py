"""What a job does while the controller of the real Slurm is down, and when it comes back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.runs import Runs


@pytest.fixture(autouse=True)
def controller_again(cluster: Cluster) -> Iterator[None]:
    """The next test needs one, also if this one fails."""
    yield
    cluster.stop_controller()
    cluster.start_controller()
    cluster.cancel_all()
    cluster.wait_for_nodes()


def test_a_controller_that_is_down_when_the_ranks_have_saved_costs_nothing(
    runs: Runs, cluster: Cluster
) -> None:
    run = runs.prepare(hold=[7])
    (run / "slow").touch()
    job = runs.submit(run)
    runs.wait_for_step(run, 7)
    cluster.run("scancel", "--signal=USR1", job)
    wait_for((run / "thinks").exists, "the end of the ranks")
    cluster.stop_controller()
    (run / "slow").unlink()
    wait_for(lambda: "the end of this attempt waits for it" in runs.log(run), "the first try")
    assert runs.attempts(run) == []
    cluster.start_controller()
    assert runs.wait_for_end(job) == "COMPLETED", runs.log(run)
    assert runs.reasons(run) == ["time limit", "done"]
    assert runs.attempts(run)[0].lost_steps == 0


def test_a_controller_that_goes_down_before_the_requeue_is_waited_for(runs: Runs, cluster: Cluster) -> None:
    wait = 'touch "$RUN/requeues"; while [[ -e $RUN/held ]]; do sleep 0.1; done'
    activate = runs.replace_program("scontrol", f'if [[ $1 == requeue ]]; then {wait}; fi; exec "$REAL" "$@"')
    failures = [{"attempt": 1, "rank": 1, "step": 6, "code": 3}]
    run = runs.prepare(failures=failures, slurm={"activate": activate})
    (run / "held").touch()
    job = runs.submit(run)
    wait_for((run / "requeues").exists, "the requeue")
    cluster.stop_controller()
    (run / "held").unlink()
    wait_for(lambda: f"`scontrol requeue {job}` failed" in runs.log(run), "the first try")
    cluster.start_controller()
    assert runs.wait_for_end(job) == "COMPLETED", runs.log(run)
    assert runs.reasons(run) == ["crashed", "done"]


def test_a_controller_that_goes_down_before_the_next_job_is_submitted_is_waited_for(
    runs: Runs, cluster: Cluster
) -> None:
    activate = runs.replace_program(
        "sbatch", 'touch "$RUN/submits"; while [[ -e $RUN/held ]]; do sleep 0.1; done; exec "$REAL" "$@"'
    )
    failures = [{"attempt": 1, "rank": 1, "step": 6, "code": 3}]
    run = runs.prepare(failures=failures, slurm={"requeue": False, "activate": activate})
    (run / "held").touch()
    job = runs.submit(run)
    wait_for((run / "submits").exists, "the submission")
    cluster.stop_controller()
    (run / "held").unlink()
    wait_for(lambda: "sbatch refused" in runs.log(run), "the first try")
    cluster.start_controller()
    wait_for(lambda: len(runs.attempts(run)) == 2, "two attempts")
    assert runs.reasons(run) == ["crashed", "done"]
    following = runs.attempts(run)[1].job
    assert following != job
    assert runs.wait_for_end(following) == "COMPLETED"
    assert len(cluster.run("scontrol", "show", "job", "-o").split(f"{run}/job.sbatch")) == 3  # no third job


def test_a_run_is_neither_lost_nor_submitted_twice_while_the_controller_is_down(
    runs: Runs, cluster: Cluster
) -> None:
    run, other = runs.prepare(hold=[3]), runs.prepare("other", hold=[3])
    job = runs.submit(run)
    runs.wait_for_step(run, 3)
    cluster.stop_controller()
    states = {state["run"]: state for state in runs.json("list", run.parent)}
    assert (states[str(run)]["state"], states[str(other)]["state"]) == ("running", "unknown")
    assert "Slurm does not answer" in states[str(other)]["detail"]
    assert "Slurm does not answer" in runs.alignkd("resume", run, code=1)
    cluster.start_controller()
    wait_for(lambda: cluster.state(job) == "RUNNING", "the controller")
    assert f"job {job} is running already" in runs.alignkd("resume", run, code=2)
