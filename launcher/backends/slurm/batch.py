"""``python -m launcher.backends.slurm.batch begin|finish RUN``: the decisions of ``job.sbatch``.

``begin`` prints ``run ATTEMPT``, or ``exit CODE`` (also when a node does not see the run folder). ``finish``
prints the exit code of the script, when it has done what must follow. Messages for people go to stderr, which
is the job's log.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

from alignkd.errors import EXIT_FAILED, EXIT_OK, EXIT_SAVED_ON_TERM, EXIT_SAVED_ON_USR1, EXIT_USER_ERROR
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.result import result_status
from launcher.backends.node_probe import places_of, problems, warnings
from launcher.backends.slurm import script
from launcher.backends.slurm.client import lost_nodes, running_jobs
from launcher.backends.slurm.finish import finish
from launcher.backends.slurm.job_facts import queue_seconds
from launcher.backends.slurm.lifecycle import FOREVER_SECONDS, MAX_AT_FAULT
from launcher.backends.slurm.node_probe import ask_nodes
from launcher.backends.slurm.restart import restart
from launcher.backends.slurm.script import (
    POLL_SECONDS,
    asked,
    hold_sigterm,
    in_users_allocation,
    node_count,
    nodes_of_ranks,
    say,
)
from launcher.run.attempts import Attempt, Reason, begin, close, close_killed, newest_step, open_attempt
from launcher.run.restarts import (
    GIVEN_UP_FOR_NODES,
    in_a_row,
    lost_too_often,
    since_submission,
    suspected_nodes,
)


def begin_attempt(run: Path) -> str:
    job = os.environ["SLURM_JOB_ID"]
    if result_status(run) == "done":
        say(f"{run} is done already")
        return f"exit {EXIT_OK}"
    other = open_attempt(run)
    if other is not None and other.job != job and _runs_for_sure(other.job):
        say(f"{run}: job {other.job} is training this run; two would write the same checkpoints")
        return f"exit {EXIT_USER_ERROR}"
    requeued = "SLURM_RESTART_COUNT" in os.environ
    if (words := asked(run)) is not None:
        RunPaths(run).stop.unlink(missing_ok=True)
        if job in words or requeued:  # else it was meant for another job
            reason, code = _end_of(words)
            say(f"{reason} before it started; continue with `alignkd resume`")
            return f"exit {code}"
    close_killed(run, lost_nodes)
    # Slurm requeues the job of a lost node by itself: `finish` cannot end a run that loses node after node.
    if requeued and lost_too_often(since_submission(run)):
        say(GIVEN_UP_FOR_NODES)
        return f"exit {EXIT_FAILED}"
    attempt = begin(run, job, nodes_of_ranks(run), queue_seconds(job))
    say(f"attempt {attempt.number} on {attempt.nodes}, from step {attempt.first_step}")
    count = node_count(run)
    unseen = ask_nodes(places_of(run), count, attempt.nodes) if count > 1 else {}
    if (words := asked(run)) is not None:
        # The signal that came with the file has ended the probe, which says nothing about the nodes.
        reason, code = _end_of(words)
        close(run, attempt, reason)
        RunPaths(run).stop.unlink(missing_ok=True)
        say(f"{reason} before the ranks were started; continue with `alignkd resume`")
        return f"exit {code}"
    for line in (*(refused := problems(unseen)), *warnings(unseen)):
        say(line)
    if refused:
        blind = [node for node in sorted(unseen) if problems({node: unseen[node]})]
        return f"exit {_end_for_blind_nodes(run, attempt, blind)}"
    return f"run {attempt.number}"


def _end_for_blind_nodes(run: Path, attempt: Attempt, blind: list[str]) -> int:
    """By the rule of ``lifecycle``: one node alone, in a run that has trained before, is at fault itself."""
    history = since_submission(run)
    trained, before = newest_step(run) > 0, in_a_row(history, (Reason.NODE_AT_FAULT,))
    if in_users_allocation() or len(blind) > 1 or not trained or before >= MAX_AT_FAULT:
        close(run, attempt, Reason.BAD_INPUT, blind)
        return EXIT_USER_ERROR
    close(run, attempt, Reason.NODE_AT_FAULT, blind)
    say(f"not visible on {blind[0]} only; retry {before + 1} of {MAX_AT_FAULT} without it")
    hold_sigterm()  # Slurm sends it after a requeue; the node has yet to be excluded then
    deadline = time.monotonic() + FOREVER_SECONDS
    return restart(run, attempt.job, suspected_nodes(since_submission(run)), deadline)


def _runs_for_sure(job: str) -> bool:
    """Is the other job running? Waits while Slurm does not answer: a wrong guess means two writers."""
    end = time.monotonic() + FOREVER_SECONDS
    while (running := running_jobs([job])) is None and time.monotonic() < end:
        say(f"Slurm does not answer; the start waits to hear whether job {job} is running")
        script.pause(POLL_SECONDS)
    return running is None or job in running


def _end_of(words: list[str]) -> tuple[Reason, int]:
    """Reason and exit code of a job that ends before it has started a rank."""
    if "TERM" in words:
        return Reason.CANCELLED, EXIT_SAVED_ON_TERM
    return Reason.STOPPED, EXIT_SAVED_ON_USR1


def main(arguments: list[str]) -> None:
    match arguments:
        case ["begin", run]:
            print(begin_attempt(Path(run)))
        case ["finish", run, status]:
            hold_sigterm()
            print(finish(Path(run), int(status)))
        case _:
            sys.exit("usage: python -m launcher.backends.slurm.batch begin RUN | finish RUN STATUS")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the job script was killed; what matters is in files
        main(sys.argv[1:])
