"""What a job does after its ranks have ended: a pure decision from the evidence.

Files count first (result.json, committed checkpoints, each rank's exit code), then what Slurm says about the
job. Two rules carry the rest:

- USR1 is a planned stop (the time limit is near): save, then restart.
- TERM means "leave": save, and never restart from inside. Slurm requeues a preempted job by itself, and a
  cancelled one must stay cancelled. The one exception is the time limit, where TERM comes too but nothing
  else would restart the job.
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
from launcher.run.exit_codes import failed_rank

FOREVER_SECONDS = 24 * 3600
WAIT_SECONDS = 120  # longer than any KillWait (30 s by default), in case Slurm does not end the script


class Action(StrEnum):
    EXIT = "exit"  # with `value` as the exit code
    RESTART = "restart"
    WAIT = "wait"  # at most `value` seconds, for Slurm to end the job


@dataclass(frozen=True)
class JobState:
    """What ``scontrol show job`` says while the batch script runs. The defaults are those of a job that Slurm
    leaves alone."""

    state: str = "RUNNING"
    reason: str = "None"
    preempted: bool = False
    requeued: bool = False  # Slurm will restart it as soon as this start has ended

    @property
    def being_ended(self) -> bool:
        return self.state != "RUNNING"


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
    job: JobState = field(default_factory=JobState)
    hang: str | None = None  # who is behind, when the watch ended the ranks
    lost_nodes: tuple[str, ...] = ()  # of the job, according to Slurm or because they do not answer


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
    if EXIT_USER_ERROR in codes:
        return Decision(
            Action.EXIT, EXIT_USER_ERROR, Reason.BAD_INPUT, "a restart would fail in the same way"
        )
    if found.stop_requested:
        return Decision(Action.EXIT, EXIT_SAVED_ON_USR1, Reason.STOPPED, "`alignkd stop` asked for it")
    if found.cancel_requested:
        return Decision(Action.EXIT, EXIT_SAVED_ON_TERM, Reason.CANCELLED, "`alignkd cancel` asked for it")
    if found.job.reason == "TimeLimit":
        return _restart(found, Reason.TIME_LIMIT, "the time limit is reached")
    if found.job.preempted:
        return Decision(Action.WAIT, FOREVER_SECONDS, Reason.PREEMPTED, "Slurm ends the job and requeues it")
    if found.lost_nodes:
        return _after_a_lost_node(found)
    if found.job.requeued:
        return Decision(Action.EXIT, EXIT_SAVED_ON_TERM, Reason.REQUEUED, "Slurm restarts the job")
    if found.job.being_ended:
        # Slurm has decided already; how the script ends changes nothing.
        return Decision(Action.EXIT, EXIT_SAVED_ON_TERM, Reason.CANCELLED, "the job was cancelled")
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


def _after_a_lost_node(found: Evidence) -> Decision:
    """Not the fault of the run, so it does not count towards ``max_restarts``."""
    why = f"lost: {', '.join(found.lost_nodes)}"
    if found.job.being_ended:
        return Decision(Action.EXIT, EXIT_SAVED_ON_TERM, Reason.NODE_LOST, f"{why}; Slurm ends the job")
    return Decision(Action.RESTART, 0, Reason.NODE_LOST, f"{why}; the run restarts")


def _restart(found: Evidence, reason: Reason, why: str) -> Decision:
    if found.progressed:
        return Decision(Action.RESTART, 0, reason, f"{why}; the run resumes from its newest checkpoint")
    if found.fruitless_before < found.max_restarts:
        number = f"{found.fruitless_before + 1} of {found.max_restarts}"
        return Decision(Action.RESTART, 0, reason, f"{why}; restart {number} without a new checkpoint")
    failures = (code for code in found.codes.values() if code not in (0, 85, 86))
    code = EXIT_HUNG if reason is Reason.HUNG else next(failures, EXIT_FAILED)
    return Decision(
        Action.EXIT,
        code,
        reason,
        f"{why}; given up after {found.max_restarts} restarts without a new checkpoint (slurm.max_restarts)",
    )
