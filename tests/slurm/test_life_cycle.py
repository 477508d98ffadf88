"""What a job does on each event of its life, on the real Slurm, with ranks that keep the contract."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.launcher.conftest import FIXTURE
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.runs import Runs

# Each has several characters that a shell or Slurm would take for something else: a job takes some seconds.
NASTY = ["with space quo'te", 'dou"ble $(touch x) ha#sh %j', "back\\slash semi;&|* Umlaut-ä-漢"]


def test_a_script_submitted_by_hand_runs_to_its_end(runs: Runs) -> None:
    run = runs.prepare(nodes=4)
    job = runs.submit(run)
    assert runs.wait_for_end(job) == "COMPLETED", runs.log(run)
    (attempt,) = runs.attempts(run)
    assert (attempt.reason, attempt.job, attempt.nodes) == ("done", job, "n[1-4]")
    assert (attempt.first_step, attempt.last_step, attempt.saved_step, attempt.lost_steps) == (0, 10, 10, 0)
    assert attempt.queue_seconds is not None
    again = runs.submit(run)
    assert runs.wait_for_end(again) == "COMPLETED"
    assert len(runs.attempts(run)) == 1
    assert "is done already" in runs.log(run)


def test_the_time_limit_itself_requeues_too(runs: Runs) -> None:
    """When USR1 was no help (here: never sent in time), TERM comes at the limit."""
    run = runs.prepare(hold=[7], slurm={"sbatch_options": {"signal": False}})
    job = runs.submit(run)
    runs.wait_for_step(run, 7)
    runs.cluster.end_in(job, 2)
    assert runs.wait_for_end(job) == "COMPLETED", runs.log(run)
    assert runs.reasons(run) == ["time limit", "done"]
    first, second = runs.attempts(run)
    assert (first.lost_steps, second.first_step) == (0, 7)


def test_a_crash_after_a_preemption_is_a_crash(runs: Runs, cluster: Cluster) -> None:
    """What Slurm noted about the preemption must not speak for the attempts after it."""
    run = runs.prepare(every=1000, hold=[5], failures=[{"attempt": 2, "rank": 0, "step": 8, "code": 3}])
    job = runs.submit(run)
    runs.wait_for_step(run, 5)
    cluster.preempt()
    assert runs.wait_for_end(job) == "COMPLETED", runs.log(run)
    assert runs.reasons(run) == ["preempted", "crashed", "done"]


def test_a_lost_node_is_told_from_a_crash(runs: Runs, cluster: Cluster) -> None:
    """Rank 0 does not notice that rank 1 is gone, as when a power cord is pulled; Slurm does in the end."""
    run = runs.prepare(hold=[7, 9])
    job = runs.submit(run)
    runs.wait_for_step(run, 7)
    cluster.lose_node("n2")
    try:
        cluster.notice("n2")
        wait_for((run / "exits" / "rank-0").exists, "the end of rank 0")
        cluster.clear(job)
        wait_for(lambda: runs.attempts(run), "the end of the attempt")
        runs.wait_for_step(run, 9)
        state = runs.json("status", run)
        assert (state["state"], state["reasons"]) == ("running", ["node lost (n2)"])
        assert "node lost (n2)" in runs.alignkd("status", run)
    finally:
        cluster.start_node("n2")
    (attempt,) = runs.attempts(run)
    assert (attempt.reason, attempt.bad_nodes, attempt.nodes) == ("node lost", ("n2",), "n[1-2]")


def test_the_loss_of_the_node_of_the_script_is_recorded_by_the_next_attempt(
    runs: Runs, cluster: Cluster
) -> None:
    """Nobody is left to write down why: the next attempt does, and asks Slurm."""
    run = runs.prepare(hold=[7])
    job = runs.submit(run)
    runs.wait_for_step(run, 7)
    cluster.lose_node("n1")
    try:
        cluster.notice("n1")
        cluster.clear(job)
        assert runs.wait_for_end(job) == "COMPLETED", runs.log(run)
    finally:
        cluster.start_node("n1")
    first, second = runs.attempts(run)
    assert (first.reason, first.bad_nodes, second.reason) == ("node lost", ("n1",), "done")
    assert (first.saved_step, first.lost_steps, second.first_step) == (5, 2, 5)


def test_a_node_is_known_to_be_lost_before_slurm_notices(runs: Runs, cluster: Cluster) -> None:
    """srun sees that the ranks of n2 are gone; they recorded no exit, and n2 no longer answers."""
    run = runs.prepare(hold=[7])
    job = runs.submit(run)
    runs.wait_for_step(run, 7)
    cluster.lose_node("n2", ranks_first=True)
    try:
        wait_for(lambda: runs.attempts(run), "the end of the attempt")
        cluster.notice("n2")  # the job may have been placed on it again
        assert runs.wait_for_end(job) == "COMPLETED", runs.log(run)
    finally:
        cluster.start_node("n2")
    first, *_, last = runs.attempts(run)
    assert (first.reason, first.bad_nodes, last.reason) == ("node lost", ("n2",), "done")
    assert "n2" not in last.nodes


def test_a_node_that_does_not_see_the_run_folder_is_named(runs: Runs, cluster: Cluster) -> None:
    """n2 has an empty folder in its place, as on a disk of its own."""
    run = runs.prepare()
    cluster.lose_node("n2")
    hide = 'mount -t tmpfs none "$0" && exec "$@"'
    cluster.start_node("n2", "unshare", "--mount", "bash", "-c", hide, str(run.parent))
    cluster.wait_for_nodes()
    try:
        job = runs.submit(run)
        assert runs.wait_for_end(job) == "FAILED", runs.log(run)
    finally:
        cluster.lose_node("n2")
        cluster.start_node("n2")
    assert cluster.job(job)["ExitCode"] == "2:0"
    (attempt,) = runs.attempts(run)
    assert (attempt.reason, attempt.bad_nodes) == ("configuration error", ("n2",))
    assert f"n2 cannot see run.folder = {run}: it must be on a file system that all nodes share" in runs.log(
        run
    )
    state = runs.json("status", run)
    assert (state["state"], state["detail"]) == (
        "failed",
        f"configuration error: n2 cannot see run.folder = {run}: it must be on a file system that all nodes "
        "share",
    )


def test_every_folder_that_a_node_does_not_see_is_named(runs: Runs, cluster: Cluster) -> None:
    """Checkpoints are on node-local disks, and the teacher's file system is not mounted on n2."""
    run, scratch, teacher = runs.prepare(), runs.folder / "scratch", FIXTURE / "teacher"
    scratch.mkdir()
    (run / "checkpoints").rmdir()
    (run / "checkpoints").symlink_to(scratch)
    cluster.lose_node("n2")
    hide = 'mount -t tmpfs none "$0" && mount -t tmpfs none "$1" && shift && exec "$@"'
    cluster.start_node("n2", "unshare", "--mount", "bash", "-c", hide, str(scratch), str(FIXTURE))
    cluster.wait_for_nodes()
    try:
        job = runs.submit(run)
        assert runs.wait_for_end(job) == "FAILED", runs.log(run)
    finally:
        cluster.lose_node("n2")
        cluster.start_node("n2")
    assert cluster.job(job)["ExitCode"] == "2:0"
    (attempt,) = runs.attempts(run)
    assert (attempt.reason, attempt.bad_nodes) == ("configuration error", ("n2",))
    shared = (
        f"n2 cannot see checkpoints = {run}/checkpoints: it must be on a file system that all nodes share"
    )
    assert shared in runs.log(run)
    assert f"n2 cannot see model.teacher = {teacher}" in runs.log(run)
    assert "cannot see run.folder" not in runs.log(run)


def test_a_run_that_has_trained_leaves_out_the_one_node_that_does_not_see_a_folder(
    runs: Runs, cluster: Cluster
) -> None:
    run = runs.prepare(hold=[3])
    job = runs.submit(run)
    runs.wait_for_step(run, 3)
    runs.alignkd("stop", run)
    runs.wait_for_end(job)
    cluster.lose_node("n2")
    hide = 'mount -t tmpfs none "$0" && exec "$@"'
    cluster.start_node("n2", "unshare", "--mount", "bash", "-c", hide, str(FIXTURE))
    cluster.wait_for_nodes()
    try:
        job = runs.submit(run)
        assert runs.wait_for_end(job) == "COMPLETED", runs.log(run)
    finally:
        cluster.lose_node("n2")
        cluster.start_node("n2")
    _, second, third = runs.attempts(run)
    assert (second.reason, second.bad_nodes) == ("node at fault", ("n2",))
    assert (third.reason, third.first_step, "2" in third.nodes) == ("done", 3, False), third.nodes


def test_one_crash_restarts_from_the_last_checkpoint(runs: Runs) -> None:
    run = runs.prepare(steps=12, failures=[{"attempt": 1, "rank": 1, "step": 7, "code": 3}])
    job = runs.submit(run)
    assert runs.wait_for_end(job) == "COMPLETED", runs.log(run)
    first, second = runs.attempts(run)
    assert (first.reason, second.reason) == ("crashed", "done")
    assert (first.saved_step, second.first_step) == (5, 5)
    assert first.lost_steps == (first.last_step or 0) - 5 >= 2
    assert "rank 1 ended with exit code 3" in runs.log(run)  # not the 143 of the rank that srun killed


def test_a_crash_loop_ends_with_the_first_error(runs: Runs) -> None:
    failures = [{"attempt": n, "rank": 1, "step": 2, "code": 3} for n in range(1, 9)]
    run = runs.prepare(failures=failures, slurm={"max_restarts": 2})
    job = runs.submit(run)
    assert runs.wait_for_end(job) == "FAILED", runs.log(run)
    assert runs.reasons(run) == ["crashed"] * 3
    assert runs.cluster.job(job)["ExitCode"] == "3:0"
    assert "given up after 2 restarts" in runs.log(run)
    assert "| out of cheese at step 2" in runs.log(run)


def test_a_new_checkpoint_resets_the_count_of_restarts(runs: Runs) -> None:
    failures = [{"attempt": n, "rank": 0, "step": 4 * n + 1, "code": -9} for n in range(1, 4)]
    run = runs.prepare(steps=16, every=4, failures=failures, slurm={"max_restarts": 1})
    job = runs.submit(run)
    assert runs.wait_for_end(job) == "COMPLETED", runs.log(run)
    assert runs.reasons(run) == ["crashed"] * 3 + ["done"]


def test_a_node_on_which_two_attempts_crashed_is_excluded(runs: Runs) -> None:
    failures = [{"attempt": n, "rank": 1, "step": 2, "code": 3} for n in (1, 2)]
    run = runs.prepare(failures=failures)
    job = runs.submit(run)
    assert runs.wait_for_end(job) == "COMPLETED", runs.log(run)
    *crashes, last = runs.attempts(run)
    assert [(attempt.reason, attempt.failed_node) for attempt in crashes] == [("crashed", "n2")] * 2
    assert (last.reason, "2" in last.nodes) == ("done", False), last.nodes


def test_a_node_that_the_run_needs_is_not_excluded(runs: Runs) -> None:
    """It would be pending for ever."""
    failures = [{"attempt": n, "rank": 1, "step": 2, "code": 3} for n in (1, 2)]
    run = runs.prepare(nodes=4, failures=failures)
    assert runs.wait_for_end(runs.submit(run)) == "COMPLETED", runs.log(run)
    assert runs.reasons(run) == ["crashed", "crashed", "done"]
    assert "n2: not excluded from the next start" in runs.log(run)


def test_bad_input_on_one_node_of_a_run_that_has_trained_is_retried_on_other_nodes(runs: Runs) -> None:
    run = runs.prepare(failures=[{"attempt": 1, "rank": 1, "step": 7, "code": 2}])
    job = runs.submit(run)
    assert runs.wait_for_end(job) == "COMPLETED", runs.log(run)
    first, second = runs.attempts(run)
    assert (first.reason, first.bad_nodes) == ("node at fault", ("n2",))
    assert (second.reason, "2" in second.nodes) == ("done", False), second.nodes


def test_bad_input_is_never_retried(runs: Runs) -> None:
    run = runs.prepare(failures=[{"attempt": 1, "rank": 1, "step": 0, "code": 2}])
    job = runs.submit(run)
    assert runs.wait_for_end(job) == "FAILED"
    assert runs.reasons(run) == ["configuration error"]
    assert runs.cluster.job(job)["ExitCode"] == "2:0"
    assert "sample a: no such image" in (run / "logs" / f"slurm-{job}.log").read_text()


def test_a_cancelled_job_stays_cancelled(runs: Runs, cluster: Cluster) -> None:
    run = runs.prepare(hold=[3])
    job = runs.submit(run)
    runs.wait_for_step(run, 3)
    cluster.run("scancel", job)
    assert runs.wait_for_end(job) == "CANCELLED"
    (attempt,) = runs.attempts(run)
    assert (attempt.reason, attempt.lost_steps) == ("cancelled", 0)
    assert cluster.run("squeue", "-h") == ""
    # Submitted again by hand, it goes on.
    assert runs.wait_for_end(runs.submit(run)) == "COMPLETED"
    assert runs.attempts(run)[1].first_step == attempt.saved_step


def test_a_cancel_while_the_verdict_is_found_stays_a_cancel(runs: Runs, cluster: Cluster) -> None:
    run = runs.prepare(hold=[3])
    (run / "slow").touch()
    job = runs.submit(run)
    runs.wait_for_step(run, 3)
    cluster.run("scancel", "--signal=USR1", job)  # as before the time limit: it would be requeued
    wait_for((run / "result.json").exists, "the save")
    wait_for((run / "thinks").exists, "the verdict")
    cluster.run("scancel", job)
    wait_for(lambda: cluster.state(job) != "RUNNING", "the cancel")
    (run / "slow").unlink()
    assert runs.wait_for_end(job) == "CANCELLED", runs.log(run)
    assert cluster.run("squeue", "-h") == ""
    assert len(runs.attempts(run)) == 1


def test_without_requeue_one_job_follows_another(runs: Runs, cluster: Cluster) -> None:
    failures = [{"attempt": 1, "rank": 1, "step": 6, "code": 3}]
    run = runs.prepare(steps=20, failures=failures, slurm={"requeue": False})
    job = runs.submit(run)
    wait_for(lambda: len(runs.attempts(run)) == 2, "two attempts")
    first, second = runs.attempts(run)
    assert (first.reason, second.reason) == ("crashed", "done")
    assert first.job == job != second.job
    assert runs.wait_for_end(second.job) == "COMPLETED"
    assert len(cluster.run("scontrol", "show", "job", "-o").split(f"{run}/job.sbatch")) == 3  # no third job


@pytest.mark.parametrize(
    ("settings", "same_job"),
    [
        ({"partition": "brief", "requeue": False}, False),  # Slurm cancels what it may not requeue
        ({"partition": "cancel"}, True),
        ({"partition": "abrupt"}, True),  # without a grace: the job is being ended when the ranks have saved
        ({"partition": "abrupt", "requeue": False}, False),
    ],
)
def test_a_run_comes_back_after_a_preemption_that_cancels_its_job(
    runs: Runs, cluster: Cluster, settings: dict[str, object], same_job: bool
) -> None:
    run = runs.prepare(hold=[7], slurm=settings)
    job = runs.submit(run)
    runs.wait_for_step(run, 7)
    cluster.preempt()
    wait_for(lambda: len(runs.attempts(run)) == 2, "two attempts")
    first, second = runs.attempts(run)
    assert (first.reason, first.lost_steps, second.reason) == ("preempted", 0, "done"), runs.log(run)
    assert (second.job == job) == same_job
    assert runs.wait_for_end(second.job) == "COMPLETED"


def test_a_cancel_during_the_grace_of_a_preemption_stays_a_cancel(runs: Runs, cluster: Cluster) -> None:
    run = runs.prepare(hold=[7])
    job = runs.submit(run)
    runs.wait_for_step(run, 7)
    cluster.preempt()
    wait_for(lambda: runs.reasons(run) == ["preempted"], "the save")
    cluster.run("scancel", job)
    assert runs.wait_for_end(job) == "CANCELLED"
    wait_for(lambda: cluster.run("squeue", "-h") == "", "an empty queue")
    assert runs.reasons(run) == ["preempted"], runs.log(run)


def test_a_job_that_slurm_refuses_to_requeue_is_followed_by_another(runs: Runs) -> None:
    activate = runs.replace_program(
        "scontrol", '[[ $1 != requeue ]] || { echo disabled >&2; exit 1; }; exec "$REAL" "$@"'
    )
    run = runs.prepare(
        failures=[{"attempt": 1, "rank": 1, "step": 6, "code": 3}], slurm={"activate": activate}
    )
    job = runs.submit(run)
    wait_for(lambda: len(runs.attempts(run)) == 2, "two attempts")
    assert runs.reasons(run) == ["crashed", "done"]
    assert runs.attempts(run)[1].job != job


def test_a_stop_counts_while_the_next_job_is_submitted(runs: Runs, cluster: Cluster) -> None:
    """The verdict is found, and the ranks are gone: nobody is left whom a signal could tell."""
    wait = 'touch "$RUN/submits"; while [[ -e $RUN/held ]]; do sleep 0.1; done'
    activate = runs.replace_program("sbatch", f'{wait}; exec "$REAL" "$@"')
    failures = [{"attempt": 1, "rank": 1, "step": 6, "code": 3}]
    run = runs.prepare(failures=failures, slurm={"requeue": False, "activate": activate})
    (run / "held").touch()
    job = runs.submit(run)
    wait_for((run / "submits").exists, "the submission")
    assert runs.json("stop", run)["job"] == job
    (run / "held").unlink()
    assert runs.wait_for_end(job) == "FAILED"
    wait_for(lambda: cluster.run("squeue", "-h") == "", "an empty queue")
    assert runs.reasons(run) == ["crashed"]
    assert "which was to continue the run, is cancelled" in runs.log(run)
    # A later start by hand is not stopped by it.
    assert runs.wait_for_end(runs.submit(run)) == "COMPLETED", runs.log(run)


def test_a_cancel_counts_while_the_job_is_being_requeued(runs: Runs, cluster: Cluster) -> None:
    """Slurm requeues a cancelled job, too."""
    wait = 'touch "$RUN/requeues"; while [[ -e $RUN/held ]]; do sleep 0.1; done'
    activate = runs.replace_program("scontrol", f'if [[ $1 == requeue ]]; then {wait}; fi; exec "$REAL" "$@"')
    failures = [{"attempt": 1, "rank": 1, "step": 6, "code": 3}]
    run = runs.prepare(failures=failures, slurm={"activate": activate})
    (run / "held").touch()
    job = runs.submit(run)
    wait_for((run / "requeues").exists, "the requeue")
    assert runs.json("cancel", run)["job"] == job
    (run / "held").unlink()
    wait_for(lambda: cluster.run("squeue", "-h") == "", "an empty queue")
    assert runs.reasons(run) == ["crashed"], runs.log(run)
    # A later start by hand is not stopped by it.
    assert runs.wait_for_end(runs.submit(run)) == "COMPLETED", runs.log(run)


def test_a_second_job_does_not_touch_a_running_run(runs: Runs) -> None:
    run = runs.prepare(hold=[2])
    job = runs.submit(run)
    runs.wait_for_step(run, 2)
    assert runs.wait_for_end(runs.submit(run)) == "FAILED"
    assert f"job {job} is training this run" in runs.log(run)
    assert runs.cluster.state(job) == "RUNNING"
    assert runs.attempts(run) == []


def test_ranks_have_a_path_under_export_none(runs: Runs) -> None:
    run = runs.prepare(slurm={"sbatch_options": {"export": "NONE"}}, steps=2)
    job = runs.submit(run)
    assert runs.wait_for_end(job) == "COMPLETED", runs.log(run)
    assert runs.reasons(run) == ["done"]


def test_two_runs_at_once_have_ports_of_their_own(runs: Runs) -> None:
    pair = [runs.prepare(name) for name in ("one", "two")]
    jobs = [runs.submit(run) for run in pair]
    assert [runs.wait_for_end(job) for job in jobs] == ["COMPLETED"] * 2
    ports = [(run / "logs" / "rank-0.log").read_text().partition("master ")[2].split()[0] for run in pair]
    assert ports[0] != ports[1]


@pytest.mark.parametrize("name", NASTY)
def test_a_run_works_in_a_folder_of_any_name(runs: Runs, name: str) -> None:
    run = runs.prepare(folder=name, steps=2)
    job = runs.submit(run)
    assert runs.wait_for_end(job) == "COMPLETED", runs.log(run)
    assert runs.reasons(run) == ["done"]
    assert {path.name for path in (run / "logs").iterdir()} == {
        "rank-0.log",
        "rank-1.log",
        f"slurm-{job}.log",
    }
    assert not list(Path.cwd().glob("x"))


def test_a_copied_folder_is_a_run_of_its_own(runs: Runs, cluster: Cluster) -> None:
    run = runs.prepare(steps=3)
    copy = runs.folder / "elsewhere" / "copy of it"
    shutil.copytree(run, copy)
    shutil.rmtree(run)
    job = cluster.run("sbatch", "--parsable", f"--chdir={copy}", f"{copy}/job.sbatch")
    assert runs.wait_for_end(job) == "COMPLETED"
    assert runs.reasons(copy) == ["done"]
    assert not run.exists()
