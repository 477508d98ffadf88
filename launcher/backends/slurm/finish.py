"""The end of an attempt: collect the evidence, decide, record, and do what follows.

While Slurm does not answer, the attempt stays open and the script asks again: whoever wants to end the job
then has to go through the same controller.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from alignkd.errors import EXIT_BAD_NODE, EXIT_FAILED, EXIT_SAVED_ON_TERM, EXIT_USER_ERROR
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.result import result_status
from launcher.backends.slurm import script
from launcher.backends.slurm.client import hostnames, lost_nodes
from launcher.backends.slurm.job_facts import job_state
from launcher.backends.slurm.lifecycle import FOREVER_SECONDS, Action, Decision, Evidence, JobState, decide
from launcher.backends.slurm.node_probe import nodes_that_see
from launcher.backends.slurm.restart import restart
from launcher.backends.slurm.script import (
    POLL_SECONDS,
    asked,
    in_users_allocation,
    node_count,
    rank_count,
    say,
)
from launcher.run.attempts import Attempt, Reason, close, exit_codes, newest_step, open_attempt, read_history
from launcher.run.exit_codes import failed_rank, failure_report
from launcher.run.hangs import hang_codes, read_hang
from launcher.run.restarts import COUNTED, in_a_row, since_submission, suspected_nodes

_REPORTED = (Reason.CRASHED, Reason.BAD_NODE, Reason.BAD_INPUT, Reason.NODE_AT_FAULT)
LATE_SECONDS = 60.0  # until a shared file system shows what another node has written


def finish(run: Path, srun_status: int) -> int:
    """The exit code of the script. Returns when the job may end: it is requeued, followed, or over.

    May be called again when it has failed, also after it has closed the attempt.
    """
    closed = None
    attempt = open_attempt(run) or (closed := _closed_attempt(run))
    if attempt is None:
        say(f"{run}: no attempt is open")
        return srun_status or EXIT_FAILED
    deadline = time.monotonic() + FOREVER_SECONDS
    nodes = _node_names(run, attempt)
    found, decision = _judge(run, attempt, _evidence(run, attempt, srun_status, nodes), nodes, deadline)
    if closed is None:
        _record(run, attempt, found, decision, nodes)
    if in_users_allocation():
        return _exit_of_allocation(run, decision)
    decision = _wait(found, decision, attempt.job)
    if decision.action is Action.RESTART:
        return restart(run, attempt.job, suspected_nodes(since_submission(run)), deadline)
    return decision.value if decision.action is Action.EXIT else EXIT_SAVED_ON_TERM


def _closed_attempt(run: Path) -> Attempt | None:
    """The attempt of this start, if an earlier call has closed it.

    Its files stay until the next one begins, so they lead to the same decision.
    """
    last = next(reversed(read_history(run)), None)
    ours = last is not None and str(last.number) == os.environ.get("ALIGNKD_ATTEMPT")
    return last if ours else None


def _evidence(run: Path, attempt: Attempt, srun_status: int, nodes: list[str]) -> Evidence:
    """What the files say; nothing of Slurm yet."""
    codes = _all_codes(run, srun_status)
    history = [before for before in since_submission(run) if before.number != attempt.number]
    hang = read_hang(run)
    complaints = [rank for rank, code in codes.items() if code == EXIT_USER_ERROR]
    return Evidence(
        codes=codes,
        srun_status=srun_status,
        result=result_status(run),
        progressed=newest_step(run) > attempt.first_step,
        stop_requested=False,
        fruitless_before=in_a_row(history, COUNTED),
        max_restarts=int(os.environ.get("ALIGNKD_MAX_RESTARTS", "3")),
        job=None,
        hang=None if hang is None else hang.message,
        lost_before=in_a_row(history, (Reason.NODE_LOST,)),
        complaining_nodes=_nodes_of(run, complaints, nodes) if len(nodes) > 1 else (),
        trained_before=newest_step(run) > 0,
        at_fault_before=in_a_row(history, (Reason.NODE_AT_FAULT,)),
    )


def _judge(
    run: Path, attempt: Attempt, found: Evidence, nodes: list[str], deadline: float
) -> tuple[Evidence, Decision]:
    """Decide. What the files leave open has to wait until Slurm has said what becomes of the job."""
    silent = False
    while True:
        words = asked(run) or []
        found = replace(found, stop_requested="USR1" in words, cancel_requested="TERM" in words)
        decision = decide(found)
        if decision.action is not Action.ASK:
            return found, decision
        if time.monotonic() > deadline:
            return found, replace(decision, action=Action.EXIT, value=EXIT_FAILED)
        job = JobState() if in_users_allocation() else job_state(attempt.job)
        if job is not None:
            lost = _lost_nodes(run, attempt, found.codes, found.srun_status, job, nodes)
            found = replace(found, job=job, lost_nodes=lost)
            continue
        if not silent:
            say("Slurm does not answer; the end of this attempt waits for it")
        silent = True
        script.pause(POLL_SECONDS)


def _record(run: Path, attempt: Attempt, found: Evidence, decision: Decision, nodes: list[str]) -> None:
    codes = found.codes
    unusable = [rank for rank, code in codes.items() if code == EXIT_BAD_NODE]
    blamed = {
        Reason.NODE_LOST: found.lost_nodes,
        Reason.NODE_AT_FAULT: found.complaining_nodes,
        Reason.BAD_NODE: _nodes_of(run, unusable, nodes),
    }
    if decision.reason is Reason.HUNG and (hang := read_hang(run)) is not None:
        codes = hang_codes(hang)
        blamed[Reason.HUNG] = tuple(hang.nodes)
    failed = failed_rank(codes)
    closed = close(
        run,
        attempt,
        decision.reason,
        blamed.get(decision.reason, ()),
        codes=codes,
        failed_node=nodes[_node_of(run, failed)] if failed is not None and nodes else None,
    )
    # The stop file stays, whatever was decided: should Slurm requeue the job, its next start must read it.
    # `begin` discards one that was meant for another job.
    say(
        f"attempt {closed.number}: {decision.reason} at step {closed.last_step}, saved {closed.saved_step}: "
        f"{decision.why}"
    )
    if failed is not None and decision.reason in _REPORTED:
        say(failure_report(failed, codes[failed], RunPaths(run).log(failed)))


def _exit_of_allocation(run: Path, decision: Decision) -> int:
    """An allocation is never requeued: the user's next command continues the run."""
    if decision.action is Action.WAIT:
        return EXIT_SAVED_ON_TERM
    if decision.action is Action.RESTART:
        say(f"this allocation is not requeued; continue with: alignkd resume {shlex.quote(str(run))}")
    return decision.value


def _wait(found: Evidence, decision: Decision, job: str) -> Decision:
    """Wait for Slurm to end the job, and decide again by what it says then.

    Slurm requeues a preempted job only if Slurm itself ends this script: a script that exits first has
    completed, and never comes back.
    """
    start = time.monotonic()
    while decision.action is Action.WAIT and time.monotonic() < start + decision.value:
        script.pause(POLL_SECONDS)
        state = job_state(job)
        if state is not None:
            decision = decide(replace(found, job=state))
    return decision


def _all_codes(run: Path, srun_status: int) -> dict[int, int]:
    """Exit codes of the ranks, as far as they have been recorded.

    Waits for late ones where they decide: after a good end, and before one node is blamed for bad input.
    """
    ranks = rank_count(run)
    end = time.monotonic() + LATE_SECONDS
    may_blame = node_count(run) > 1 and newest_step(run) > 0
    while len(codes := exit_codes(run)) < ranks and time.monotonic() < end:
        if srun_status != 0 and not (may_blame and EXIT_USER_ERROR in codes.values()):
            break
        time.sleep(0.5)
    return codes


def _node_names(run: Path, attempt: Attempt) -> list[str]:
    """In the order of the ranks; empty where Slurm's list cannot be read."""
    names = hostnames(attempt.nodes)
    return names if len(names) == node_count(run) else []


def _node_of(run: Path, rank: int) -> int:
    """Position of a rank's node: every node has as many ranks as any other."""
    return rank * node_count(run) // max(rank_count(run), 1)


def _nodes_of(run: Path, ranks: Sequence[int], names: list[str]) -> tuple[str, ...]:
    return tuple(sorted({names[_node_of(run, rank)] for rank in ranks})) if names else ()


def _lost_nodes(
    run: Path, attempt: Attempt, codes: Mapping[int, int], srun_status: int, job: JobState, names: list[str]
) -> tuple[str, ...]:
    """Lost nodes that explain why the ranks failed, or why Slurm ends the job; empty for any other cause."""
    if job.being_ended:
        return tuple(lost_nodes(attempt.nodes, attempt.start))
    heard = {_node_of(run, rank) for rank in codes}
    silent = [node for node in range(node_count(run)) if node not in heard]
    if not silent or srun_status == 0 or node_count(run) == 1 or not names:
        return ()
    # No rank of some node has recorded how it ended. Slurm takes minutes to notice a lost node
    # (SlurmdTimeout), so the nodes are probed.
    answers = nodes_that_see(run, node_count(run), attempt.nodes)
    if not answers:
        return ()  # Slurm does not answer, so nothing is known about any node
    return tuple(names[node] for node in silent if names[node] not in answers)
