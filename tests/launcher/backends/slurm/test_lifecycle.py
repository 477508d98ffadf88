from dataclasses import replace

import pytest

from launcher.backends.slurm.lifecycle import (
    MAX_AT_FAULT,
    WAIT_SECONDS,
    Action,
    Evidence,
    JobState,
    decide,
)
from launcher.run.attempts import Reason
from launcher.run.restarts import MAX_LOST

PEACE = Evidence(
    codes={0: 0, 1: 0},
    srun_status=0,
    result=None,
    progressed=False,
    stop_requested=False,
    fruitless_before=0,
    max_restarts=3,
)
PREEMPTED, CANCELLED = JobState(preempted=True), JobState(state="COMPLETING")
REQUEUED = JobState(state="COMPLETING", requeued=True)
TIME_LIMIT = JobState(state="COMPLETING", reason="TimeLimit")
# Preempted, and not requeued by Slurm: by the mode of the partition, or because the job may not be requeued.
CANCEL_MODE = JobState(preempted=True, preempt_mode="CANCEL")
NO_REQUEUE = JobState(preempted=True, requeueable=False)
USR1, TERM, CRASH, BAD = {0: 85, 1: 85}, {0: 86, 1: 86}, {1: 3, 0: 143}, {1: 2, 0: 143}
HANG = "rank 1 on n2 is behind: step 7, training; nothing has moved for 700 s"


def ended(job: JobState, **changes: bool) -> JobState:
    return replace(job, state="COMPLETING", **changes)


@pytest.mark.parametrize(
    ("changes", "action", "reason"),
    [
        ({"result": "done"}, Action.EXIT, Reason.DONE),
        # Files count first: the run was finished when the signal came.
        ({"result": "done", "job": CANCELLED, "codes": TERM}, Action.EXIT, Reason.DONE),
        ({"codes": BAD}, Action.EXIT, Reason.BAD_INPUT),
        ({"codes": BAD, "progressed": True, "trained_before": True}, Action.EXIT, Reason.BAD_INPUT),
        ({"codes": USR1, "result": "stopped"}, Action.RESTART, Reason.TIME_LIMIT),
        ({"codes": USR1, "stop_requested": True}, Action.EXIT, Reason.STOPPED),
        # USR1 kills a rank that has just started; a stop was requested, so this is not a crash.
        ({"codes": {0: 138, 1: 143}, "stop_requested": True}, Action.EXIT, Reason.STOPPED),
        ({"codes": TERM, "job": PREEMPTED}, Action.WAIT, Reason.PREEMPTED),
        ({"codes": CRASH, "job": PREEMPTED}, Action.WAIT, Reason.PREEMPTED),
        (
            {"codes": TERM, "job": replace(CANCELLED, preempted=True, requeued=True)},
            Action.EXIT,
            Reason.PREEMPTED,
        ),
        # Nothing would bring these back.
        ({"codes": TERM, "job": NO_REQUEUE}, Action.RESTART, Reason.PREEMPTED),
        ({"codes": TERM, "job": CANCEL_MODE}, Action.RESTART, Reason.PREEMPTED),
        ({"codes": TERM, "job": CANCEL_MODE, "fruitless_before": 3}, Action.RESTART, Reason.PREEMPTED),
        ({"codes": TERM, "job": ended(CANCEL_MODE, grace_over=True)}, Action.RESTART, Reason.PREEMPTED),
        ({"codes": TERM, "job": ended(NO_REQUEUE, grace_over=True)}, Action.RESTART, Reason.PREEMPTED),
        # Cancelled by a person before the grace was over.
        ({"codes": TERM, "job": ended(CANCEL_MODE)}, Action.EXIT, Reason.CANCELLED),
        ({"codes": TERM, "job": ended(PREEMPTED)}, Action.EXIT, Reason.CANCELLED),
        ({"codes": TERM, "job": ended(PREEMPTED, grace_over=True)}, Action.EXIT, Reason.CANCELLED),
        ({"codes": TERM, "job": CANCELLED}, Action.EXIT, Reason.CANCELLED),
        ({"codes": {}, "srun_status": 143, "job": CANCELLED}, Action.EXIT, Reason.CANCELLED),
        # Slurm says why it ends the job, so it is not a cancel.
        ({"codes": TERM, "job": REQUEUED}, Action.EXIT, Reason.REQUEUED),
        ({"codes": {}, "job": REQUEUED, "lost_nodes": ("n2",)}, Action.EXIT, Reason.NODE_LOST),
        ({"codes": TERM, "job": PREEMPTED, "lost_nodes": ("n2",)}, Action.WAIT, Reason.PREEMPTED),
        # The other ranks failed because of the lost node, so it does not count as a crash.
        ({"codes": {0: 1}, "lost_nodes": ("n2",)}, Action.RESTART, Reason.NODE_LOST),
        ({"codes": {0: 1}, "lost_nodes": ("n2",), "fruitless_before": 3}, Action.RESTART, Reason.NODE_LOST),
        # Both signals: the sender of TERM decides.
        ({"codes": {0: 85, 1: 86}}, Action.WAIT, Reason.TERMINATED),
        ({"codes": TERM}, Action.WAIT, Reason.TERMINATED),
        ({"codes": TERM, "job": TIME_LIMIT}, Action.RESTART, Reason.TIME_LIMIT),
        ({"codes": {}, "job": TIME_LIMIT}, Action.RESTART, Reason.TIME_LIMIT),
        ({"codes": CRASH}, Action.RESTART, Reason.CRASHED),
        ({"codes": {}, "srun_status": 1}, Action.RESTART, Reason.CRASHED),
        ({"codes": {}, "srun_status": 137, "hang": HANG}, Action.RESTART, Reason.HUNG),
        # The watch ended ranks that had been told to leave, or that wait for a node which is gone.
        ({"codes": {}, "hang": HANG, "job": CANCELLED}, Action.EXIT, Reason.CANCELLED),
        ({"codes": {}, "hang": HANG, "lost_nodes": ("n2",)}, Action.RESTART, Reason.NODE_LOST),
        ({"codes": {}, "hang": HANG, "stop_requested": True}, Action.EXIT, Reason.STOPPED),
        # The others were ended because of the rank without a GPU.
        ({"codes": {1: 88, 0: 143}}, Action.RESTART, Reason.BAD_NODE),
        ({"codes": {1: 88, 0: 143}, "fruitless_before": 3}, Action.EXIT, Reason.BAD_NODE),
        ({"codes": {0: 1, 1: 88}}, Action.RESTART, Reason.CRASHED),
        # A rank that failed while others saved: the save needs all of them.
        ({"codes": {0: 85, 1: 139}}, Action.RESTART, Reason.CRASHED),
    ],
)
def test_every_event_has_an_action_and_a_reason(changes, action: Action, reason: Reason) -> None:
    decision = decide(replace(PEACE, **changes))
    assert (decision.action, decision.reason) == (action, reason)


def test_the_wait_for_a_preemption_is_longer_than_any_grace() -> None:
    assert decide(replace(PEACE, codes=TERM, job=PREEMPTED)).value > 3600
    assert decide(replace(PEACE, codes=TERM)).value == WAIT_SECONDS


@pytest.mark.parametrize("codes", [USR1, CRASH])
def test_restarts_without_progress_are_counted(codes) -> None:
    assert decide(replace(PEACE, codes=codes, fruitless_before=2)).action is Action.RESTART
    given_up = decide(replace(PEACE, codes=codes, fruitless_before=3))
    assert given_up.action is Action.EXIT
    assert given_up.value != 0
    assert "slurm.max_restarts" in given_up.why
    assert decide(replace(PEACE, codes=codes, fruitless_before=3, progressed=True)).action is Action.RESTART


def test_a_run_that_hangs_again_and_again_is_given_up_with_a_code_of_its_own() -> None:
    found = replace(PEACE, codes={}, srun_status=137, hang=HANG, fruitless_before=3)
    given_up = decide(found)
    assert (given_up.action, given_up.value, given_up.reason) == (Action.EXIT, 87, Reason.HUNG)
    assert given_up.why.startswith("rank 1 on n2 is behind: step 7, training; given up")


def test_the_exit_code_is_that_of_the_first_rank_that_failed() -> None:
    assert decide(replace(PEACE, codes={2: 7, 0: 1, 1: 143}, max_restarts=0)).value == 7


@pytest.mark.parametrize(
    ("changes", "action"),
    [
        # What the files say does not depend on Slurm.
        ({"result": "done"}, Action.EXIT),
        ({"codes": BAD}, Action.EXIT),
        ({"codes": USR1, "stop_requested": True}, Action.EXIT),
        ({"codes": TERM, "cancel_requested": True}, Action.EXIT),
        # Everything else does: silence is neither a cancel nor the leave to restart.
        ({"codes": USR1}, Action.ASK),
        ({"codes": TERM}, Action.ASK),
        ({"codes": CRASH}, Action.ASK),
        ({"codes": CRASH, "fruitless_before": 3}, Action.ASK),
        ({"codes": BAD, "trained_before": True, "complaining_nodes": ("n1",)}, Action.ASK),
    ],
)
def test_the_silence_of_slurm_decides_nothing(changes, action: Action) -> None:
    assert decide(replace(PEACE, job=None, **changes)).action is action


@pytest.mark.parametrize(
    ("job", "for_good"),
    [
        (JobState(), False),
        (CANCELLED, True),
        (TIME_LIMIT, False),
        (REQUEUED, True),
        (CANCEL_MODE, False),
        (ended(CANCEL_MODE), True),
        (ended(CANCEL_MODE, grace_over=True), False),
        (ended(NO_REQUEUE, grace_over=True), False),
        (ended(PREEMPTED, grace_over=True), True),
    ],
)
def test_only_a_job_that_nobody_ended_may_be_brought_back(job: JobState, for_good: bool) -> None:
    assert job.ended_for_good == for_good


AT_FAULT = replace(PEACE, codes=BAD, complaining_nodes=("n1",), trained_before=True)


@pytest.mark.parametrize(
    ("changes", "action", "reason"),
    [
        ({}, Action.RESTART, Reason.NODE_AT_FAULT),
        ({"at_fault_before": MAX_AT_FAULT - 1}, Action.RESTART, Reason.NODE_AT_FAULT),
        ({"at_fault_before": MAX_AT_FAULT}, Action.EXIT, Reason.BAD_INPUT),
        ({"trained_before": False}, Action.EXIT, Reason.BAD_INPUT),  # the first start: most likely a typo
        ({"complaining_nodes": ("n1", "n2")}, Action.EXIT, Reason.BAD_INPUT),  # so it is not the node
        ({"complaining_nodes": ()}, Action.EXIT, Reason.BAD_INPUT),  # unknown
        ({"stop_requested": True}, Action.EXIT, Reason.STOPPED),
        ({"job": CANCELLED}, Action.EXIT, Reason.CANCELLED),
        ({"job": PREEMPTED}, Action.WAIT, Reason.PREEMPTED),
    ],
)
def test_bad_input_on_one_node_of_a_run_that_has_trained_is_retried_without_it(
    changes, action: Action, reason: Reason
) -> None:
    decision = decide(replace(AT_FAULT, **changes))
    assert (decision.action, decision.reason) == (action, reason)
    assert reason is not Reason.BAD_INPUT or decision.value == 2


@pytest.mark.parametrize(
    ("before", "progressed", "action"),
    [(MAX_LOST - 2, False, Action.RESTART), (MAX_LOST - 1, False, Action.EXIT), (99, True, Action.RESTART)],
)
def test_a_run_that_loses_node_after_node_is_given_up(before: int, progressed: bool, action: Action) -> None:
    lost = replace(PEACE, codes={0: 1}, lost_nodes=("n2",), lost_before=before, progressed=progressed)
    decision = decide(lost)
    assert (decision.action, decision.reason) == (action, Reason.NODE_LOST)
    assert decision.value == 1


def test_a_restart_carries_the_exit_code_for_an_allocation_which_is_not_restarted() -> None:
    assert decide(replace(PEACE, codes=USR1)).value == 85
    assert decide(replace(PEACE, codes=CRASH)).value == 3
    assert decide(replace(PEACE, codes={}, srun_status=1)).value == 1
