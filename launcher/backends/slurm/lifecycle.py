"""What a job does after its ranks have ended: a pure decision from the evidence.

Files count first (result.json, committed checkpoints, each rank's exit code), then what Slurm says about the
job. Three rules carry the rest:

- USR1 is a planned stop (the time limit is near): save, then restart.
- TERM means "leave": save, and never restart from inside. Slurm requeues a preempted job by itself, and a
  cancelled one must stay cancelled. The exceptions are jobs that Slurm would not bring back by itself: at
  their time limit, and preempted ones that may not be requeued.
- Silence means nothing: while Slurm does not answer, nothing is decided that depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from alignkd.errors import (
    EXIT_BAD_NODE,
    EXIT_FAILED,
    EXIT_HUNG,
    EXIT_OK,
    EXIT_SAVED_ON_TERM,
    EXIT_SAVED_ON_USR1,
    EXIT_USER_ERROR,
)
from launcher.run.attempts import Reason
from launcher.run.exit_codes import failed_rank, is_failure
from launcher.run.restarts import GIVEN_UP_FOR_NODES, MAX_LOST

FOREVER_SECONDS = 24 * 3600
WAIT_SECONDS = 120  # longer than any KillWait (30 s by default), in case Slurm does not end the script
MAX_AT_FAULT = 2  # attempts in a row with bad input on one node only, without a new checkpoint


class Action(StrEnum):
    EXIT = "exit"  # with `value` as the exit code
    RESTART = "restart"  # requeue, or submit the next job; `value` is the exit code where neither is possible
    WAIT = "wait"  # at most `value` seconds, for Slurm to end the job
    ASK = "ask"  # Slurm about the job, again


@dataclass(frozen=True)
class JobState:
    """What ``scontrol show job`` says while the batch script runs. The defaults are those of a job that Slurm
    leaves alone."""

    state: str = "RUNNING"
    reason: str = "None"
    preempted: bool = False
    requeued: bool = False  # Slurm will restart it as soon as this start has ended
    requeueable: bool = True
    preempt_mode: str = "REQUEUE"  # of a preempted job: what Slurm does at the end of the grace
    grace_over: bool = False  # of a preempted job that is being ended: the grace was not cut short
    excluded: str | None = None  # nodes that Slurm will not place it on

    @property
    def being_ended(self) -> bool:
        return self.state != "RUNNING"

    @property
    def ended_for_good(self) -> bool:
        """Has Slurm ended it so that a restart would be against somebody's will, or happens anyway?"""
        if not self.being_ended:
            return False
        return self.requeued or not (self.reason == "TimeLimit" or self.lost_to_preemption)

    @property
    def lost_to_preemption(self) -> bool:
        """Preempted and, unlike most preempted jobs, not requeued by Slurm."""
        cancels = self.preempt_mode == "CANCEL" or not self.requeueable
        return self.preempted and cancels and (self.grace_over or not self.being_ended)


@dataclass(frozen=True)
class Evidence:
    codes: Mapping[int, int]  # rank -> exit code, in the order of the exits
    srun_status: int
    result: str | None  # status of a result.json of this attempt
    progressed: bool  # is there a newer checkpoint than at the start?
    stop_requested: bool
    fruitless_before: int  # restarts in a row without a new checkpoint
    max_restarts: int
    cancel_requested: bool = False  # for a run in an allocation, which is not cancelled itself
    job: JobState | None = field(default_factory=JobState)  # None: Slurm does not answer
    hang: str | None = None  # who is behind, when the watch ended the ranks
    lost_nodes: tuple[str, ...] = ()  # of the job, according to Slurm or because they do not answer
    lost_before: int = 0  # attempts in a row that lost a node, without a new checkpoint
    complaining_nodes: tuple[str, ...] = ()  # of several nodes, those with a rank that reports bad input
    trained_before: bool = False  # is there any checkpoint, of this or an earlier attempt?
    at_fault_before: int = 0  # attempts in a row that blamed one node for bad input


@dataclass(frozen=True)
class Decision:
    action: Action
    value: int
    reason: Reason
    why: str


def decide(found: Evidence) -> Decision:
    """The first rule that applies."""
    codes = set(found.codes.values())
    if found.result == "done":
        return Decision(Action.EXIT, EXIT_OK, Reason.DONE, "the run is finished")
    at_fault = _node_at_fault(found)
    if EXIT_USER_ERROR in codes and at_fault is None:
        return Decision(
            Action.EXIT, EXIT_USER_ERROR, Reason.BAD_INPUT, "a restart would fail in the same way"
        )
    if found.stop_requested:
        return Decision(Action.EXIT, EXIT_SAVED_ON_USR1, Reason.STOPPED, "`alignkd stop` asked for it")
    if found.cancel_requested:
        return Decision(Action.EXIT, EXIT_SAVED_ON_TERM, Reason.CANCELLED, "`alignkd cancel` asked for it")
    if found.job is None:
        return Decision(Action.ASK, 0, Reason.LOST, "Slurm does not answer")
    if found.job.reason == "TimeLimit":
        return _restart(found, Reason.TIME_LIMIT, "the time limit is reached")
    if found.job.preempted:
        return _after_a_preemption(found.job)
    if found.lost_nodes:
        return _after_a_lost_node(found, found.job)
    if found.job.requeued:
        return Decision(Action.EXIT, EXIT_SAVED_ON_TERM, Reason.REQUEUED, "Slurm restarts the job")
    if found.job.being_ended:
        # Slurm has decided already; how the script ends changes nothing.
        return Decision(Action.EXIT, EXIT_SAVED_ON_TERM, Reason.CANCELLED, "the job was cancelled")
    if at_fault is not None:
        why = f"bad input on {at_fault} only; retry {found.at_fault_before + 1} of {MAX_AT_FAULT} without it"
        return Decision(Action.RESTART, EXIT_USER_ERROR, Reason.NODE_AT_FAULT, why)
    if found.hang is not None:
        return _restart(found, Reason.HUNG, found.hang.partition(";")[0])
    if failed_rank(found.codes) is None and EXIT_SAVED_ON_TERM in codes:
        return Decision(Action.WAIT, WAIT_SECONDS, Reason.TERMINATED, "ended by SIGTERM")
    if failed_rank(found.codes) is None and EXIT_SAVED_ON_USR1 in codes:
        return _restart(found, Reason.TIME_LIMIT, "saved before the time limit")
    failed = failed_rank(found.codes)
    if failed is not None and found.codes[failed] == EXIT_BAD_NODE:
        return _restart(found, Reason.BAD_NODE, "a node cannot train")
    return _restart(found, Reason.CRASHED, "a rank failed")


def _node_at_fault(found: Evidence) -> str | None:
    """The only node that reports bad input, in a run that has trained before: a missing mount, say.

    None as well when that was tried often enough.
    """
    retry = found.trained_before and found.at_fault_before < MAX_AT_FAULT
    return found.complaining_nodes[0] if retry and len(found.complaining_nodes) == 1 else None


def _after_a_preemption(job: JobState) -> Decision:
    if job.requeued:
        return Decision(Action.EXIT, EXIT_SAVED_ON_TERM, Reason.PREEMPTED, "Slurm restarts the job")
    if job.lost_to_preemption:
        why = "Slurm cancels the job instead of requeueing it"
        return Decision(Action.RESTART, EXIT_SAVED_ON_TERM, Reason.PREEMPTED, why)
    if job.being_ended:
        why = "the job was cancelled while it was being preempted"
        return Decision(Action.EXIT, EXIT_SAVED_ON_TERM, Reason.CANCELLED, why)
    return Decision(Action.WAIT, FOREVER_SECONDS, Reason.PREEMPTED, "Slurm ends the job and requeues it")


def _after_a_lost_node(found: Evidence, job: JobState) -> Decision:
    """Not the fault of the run, so it does not count towards ``max_restarts``, unless it goes on and on."""
    why = f"lost: {', '.join(found.lost_nodes)}"
    if job.being_ended:
        return Decision(Action.EXIT, EXIT_SAVED_ON_TERM, Reason.NODE_LOST, f"{why}; Slurm ends the job")
    if found.lost_before + 1 >= MAX_LOST and not found.progressed:
        why = f"{why}; {GIVEN_UP_FOR_NODES}"
        return Decision(Action.EXIT, EXIT_FAILED, Reason.NODE_LOST, why)
    return Decision(Action.RESTART, EXIT_FAILED, Reason.NODE_LOST, f"{why}; the run restarts")


def _restart(found: Evidence, reason: Reason, why: str) -> Decision:
    failure = next((code for code in found.codes.values() if is_failure(code)), EXIT_FAILED)
    failure = EXIT_HUNG if reason is Reason.HUNG else failure
    code = EXIT_SAVED_ON_USR1 if reason is Reason.TIME_LIMIT else failure
    if found.progressed:
        return Decision(Action.RESTART, code, reason, f"{why}; the run resumes from its newest checkpoint")
    if found.fruitless_before < found.max_restarts:
        number = f"{found.fruitless_before + 1} of {found.max_restarts}"
        return Decision(Action.RESTART, code, reason, f"{why}; restart {number} without a new checkpoint")
    return Decision(
        Action.EXIT,
        failure,
        reason,
        f"{why}; given up after {found.max_restarts} restarts without a new checkpoint (slurm.max_restarts)",
    )
