from __future__ import annotations

import pytest

from launcher.backends.slurm import job_facts
from launcher.backends.slurm.job_facts import job_state, may_be_requeued, queue_seconds
from launcher.backends.slurm.lifecycle import JobState

SHOWN = (
    "JobId=5 JobName=run UserId=u(1) QOS={qos} JobState={state} Reason={reason} Requeue={requeue} Restarts=0 "
    "SubmitTime=2026-01-02T03:04:05 EligibleTime=2026-01-02T03:04:05 StartTime={start} EndTime={end} "
    "PreemptTime={preempt} Partition=low ExcNodeList={excluded} "
    "Command=/a JobState=FAILED Reason=TimeLimit PreemptTime=x/job.sbatch WorkDir=/"
)
PLAIN = {
    "state": "RUNNING",
    "reason": "None",
    "start": "2026-01-02T03:05:05",
    "end": "Unknown",
    "preempt": "None",
    "qos": "(null)",
    "excluded": "(null)",
    "requeue": "1",
}
PARTITION = "PartitionName=low GraceTime={grace} PreemptMode={mode} State=UP"


def show(
    monkeypatch: pytest.MonkeyPatch, grace: int = 25, mode: str = "REQUEUE", qos: str = "", **fields: str
) -> None:
    """What Slurm says about the job, its partition and its quality of service."""
    if qos:
        fields["qos"] = "scavenger"
    text = SHOWN.format(**{**PLAIN, **fields})
    answers = {"job": text, "partition": PARTITION.format(grace=grace, mode=mode), "qos": qos}
    monkeypatch.setattr(
        job_facts, "run_slurm_command", lambda *words: next(v for k, v in answers.items() if k in words)
    )


def test_the_state_of_a_job_is_read_from_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    show(monkeypatch)
    assert job_state("5") == JobState("RUNNING", "None", False, preempt_mode="")
    assert queue_seconds("5") == 60
    show(monkeypatch, state="COMPLETING", reason="TimeLimit", start="Unknown", requeue="0", excluded="n[1-2]")
    assert job_state("5") == JobState(
        "COMPLETING", "TimeLimit", False, requeueable=False, preempt_mode="", excluded="n[1-2]"
    )
    assert queue_seconds("5") is None


def test_without_an_answer_nothing_is_known_about_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_facts, "run_slurm_command", lambda *_: None)
    assert job_state("5") is None
    assert may_be_requeued("5") is None
    assert queue_seconds("5") is None


NOTICE = "2026-01-02T04:00:00"


@pytest.mark.parametrize(
    ("says", "mode", "grace_over"),
    [
        ({"end": "Unknown"}, "REQUEUE", False),
        ({"end": "2026-01-02T04:00:25", "mode": "CANCEL"}, "CANCEL", True),
        ({"end": "2026-01-02T04:00:12", "mode": "CANCEL"}, "CANCEL", False),  # scancel, during the grace
        ({"end": "2026-01-02T04:00:00", "mode": "CANCEL", "grace": 0}, "CANCEL", True),
        # The quality of service has the last word.
        ({"end": "2026-01-02T04:00:25", "qos": "cancel|00:02:00\n"}, "CANCEL", False),
        ({"end": "2026-01-02T04:02:00", "qos": "cancel|00:02:00\n"}, "CANCEL", True),
        ({"end": "2026-01-02T04:02:00", "qos": "cluster|\n"}, "REQUEUE", True),
    ],
)
def test_how_a_job_is_preempted_comes_from_its_partition_or_its_quality_of_service(
    monkeypatch: pytest.MonkeyPatch, says, mode: str, grace_over: bool
) -> None:
    show(monkeypatch, preempt=NOTICE, **says)
    state = job_state("5")
    assert state is not None
    assert (state.preempted, state.preempt_mode, state.grace_over) == (True, mode, grace_over)


def test_a_requeue_in_progress_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    show(monkeypatch, state="COMPLETING")
    assert not job_state("5").requeued  # type: ignore[union-attr]
    text = SHOWN.format(**{**PLAIN, "state": "COMPLETING"}).replace("Restarts=0", "Restarts=1")
    monkeypatch.setattr(job_facts, "run_slurm_command", lambda *_: text)
    assert job_state("5").requeued  # type: ignore[union-attr]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # this start is that requeue
    assert not job_state("5").requeued  # type: ignore[union-attr]


def test_a_job_may_be_requeued_if_slurm_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    show(monkeypatch)
    assert may_be_requeued("5") is True
    show(monkeypatch, requeue="0")
    assert may_be_requeued("5") is False
