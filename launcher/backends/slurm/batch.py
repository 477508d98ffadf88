"""``python -m launcher.backends.slurm.batch begin|end|chained RUN``: the decisions of ``job.sbatch``.

``begin`` prints ``run ATTEMPT``, or ``exit CODE`` (also when a node does not see the run folder); ``end``
prints ``restart 0``, ``wait SECONDS`` or ``exit CODE``; ``chained`` makes the next stage wait for the new job
of this run. Messages for people go to stderr, which is the job's log.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from pathlib import Path

from alignkd.errors import (
    EXIT_BAD_NODE,
    EXIT_OK,
    EXIT_SAVED_ON_TERM,
    EXIT_SAVED_ON_USR1,
    EXIT_USER_ERROR,
)
from alignkd.run_folder.atomic_files import read_json, write_text_atomic
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.result import result_status
from launcher.backends.node_probe import places_of, problems, warnings
from launcher.backends.slurm.client import (
    hostnames,
    is_running,
    job_state,
    lost_nodes,
    queue_seconds,
    retarget_dependency,
    run_slurm_command,
)
from launcher.backends.slurm.lifecycle import Action, Evidence, JobState, decide
from launcher.backends.slurm.node_probe import ask_nodes, nodes_that_see
from launcher.run.attempts import (
    Attempt,
    Reason,
    begin,
    close,
    exit_codes,
    fruitless_restarts,
    newest_step,
    open_attempt,
)
from launcher.run.exit_codes import failed_rank, failure_report
from launcher.run.hangs import hang_codes, read_hang

LATE_SECONDS = 60.0  # until a shared file system shows what another node has written


def begin_attempt(run: Path) -> str:
    job = os.environ["SLURM_JOB_ID"]
    if result_status(run) == "done":
        _say(f"{run} is done already")
        return f"exit {EXIT_OK}"
    other = open_attempt(run)
    if other is not None and other.job != job and is_running(other.job):
        _say(f"{run}: job {other.job} is training this run; two would write the same checkpoints")
        return f"exit {EXIT_USER_ERROR}"
    if (asked := _asked(run)) is not None:
        RunPaths(run).stop.unlink(missing_ok=True)
        if job in asked or "SLURM_RESTART_COUNT" in os.environ:  # else it was meant for another job
            reason, code = _end_of(asked)
            _say(f"{reason} before it started; continue with `alignkd resume`")
            return f"exit {code}"
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    attempt = begin(run, job, nodes, queue_seconds(job), lost=lost_nodes)
    _say(f"attempt {attempt.number} on {attempt.nodes}, from step {attempt.first_step}")
    count = _node_count()
    unseen = ask_nodes(places_of(run), count) if count > 1 else {}
    if (asked := _asked(run)) is not None:
        # The signal that came with the file has ended the probe, which says nothing about the nodes.
        reason, code = _end_of(asked)
        close(run, attempt, reason)
        RunPaths(run).stop.unlink(missing_ok=True)
        _say(f"{reason} before the ranks were started; continue with `alignkd resume`")
        return f"exit {code}"
    for line in (*(refused := problems(unseen)), *warnings(unseen)):
        _say(line)
    if refused:
        blind = [node for node in sorted(unseen) if problems({node: unseen[node]})]
        close(run, attempt, Reason.BAD_INPUT, blind)
        return f"exit {EXIT_USER_ERROR}"
    return f"run {attempt.number}"


def end_attempt(run: Path, srun_status: int) -> str:
    attempt = open_attempt(run)
    if attempt is None:
        _say(f"{run}: no attempt is open")
        return f"exit {srun_status}"
    codes = _all_codes(run, srun_status)
    job = job_state(attempt.job)
    lost = _lost_nodes(run, attempt, codes, srun_status, job)
    asked = _asked(run) or []
    hang = read_hang(run)
    decision = decide(
        Evidence(
            codes=codes,
            srun_status=srun_status,
            result=result_status(run),
            progressed=newest_step(run) > attempt.first_step,
            stop_requested="USR1" in asked,
            cancel_requested="TERM" in asked,
            fruitless_before=fruitless_restarts(run),
            max_restarts=int(os.environ.get("ALIGNKD_MAX_RESTARTS", "3")),
            job=job,
            lost_nodes=lost,
            hang=None if hang is None else hang.message,
        )
    )
    bad = {Reason.NODE_LOST: lost, Reason.BAD_NODE: _unusable_nodes(run, attempt, codes)}
    if decision.reason is Reason.HUNG and hang is not None:
        codes = hang_codes(hang)
        bad[Reason.HUNG] = hang.nodes
    closed = close(run, attempt, decision.reason, bad.get(decision.reason, ()), codes=codes)
    if decision.action is Action.EXIT:
        RunPaths(run).stop.unlink(missing_ok=True)  # otherwise one that came just now is for the next start
    _say(
        f"attempt {closed.number}: {decision.reason} at step {closed.last_step}, saved {closed.saved_step}: "
        f"{decision.why}"
    )
    failed = failed_rank(codes)
    if failed is not None and decision.reason in (Reason.CRASHED, Reason.BAD_NODE, Reason.BAD_INPUT):
        _say(failure_report(failed, codes[failed], RunPaths(run).log(failed)))
    if decision.action is Action.WAIT and "ALIGNKD_RUN" in os.environ:
        return f"exit {EXIT_SAVED_ON_TERM}"  # an allocation is never requeued
    if decision.action is Action.RESTART and "ALIGNKD_RUN" in os.environ:
        _say(f"this allocation is not requeued; continue with: alignkd resume {shlex.quote(str(run))}")
        return f"exit {EXIT_SAVED_ON_USR1}"
    return f"{decision.action} {decision.value}"


def _asked(run: Path) -> list[str] | None:
    """What `alignkd stop` or `cancel` wrote: USR1 or TERM, then the jobs it is meant for; None: nothing."""
    try:
        return RunPaths(run).stop.read_text(encoding="utf-8").split()
    except OSError:
        return None


def _end_of(asked: list[str]) -> tuple[Reason, int]:
    """Reason and exit code of a job that ends before it has started a rank."""
    if "TERM" in asked:
        return Reason.CANCELLED, EXIT_SAVED_ON_TERM
    return Reason.STOPPED, EXIT_SAVED_ON_USR1


def follow(run: Path, job: str) -> None:
    """``job`` was submitted to continue the run, on a cluster that does not requeue jobs."""
    if _asked(run) is None:  # a stop that comes after this finds the job in the queue
        retarget_dependency(run, job)
        return
    write_text_atomic(RunPaths(run).stop, f"USR1 {job}\n")  # should scancel fail, the job reads it
    if run_slurm_command("scancel", job) is not None:
        RunPaths(run).stop.unlink(missing_ok=True)
    _say(f"job {job}, which was to continue the run, is cancelled; continue with `alignkd resume`")


def _all_codes(run: Path, srun_status: int) -> dict[int, int]:
    """Exit codes of the ranks, as far as they have been recorded."""
    ranks = _rank_count(run)
    end = time.monotonic() + LATE_SECONDS
    while len(codes := exit_codes(run)) < ranks and srun_status == 0 and time.monotonic() < end:
        time.sleep(0.5)
    return codes


def _lost_nodes(
    run: Path, attempt: Attempt, codes: dict[int, int], srun_status: int, job: JobState
) -> tuple[str, ...]:
    """Lost nodes that explain why the ranks failed, or why Slurm ends the job; empty for any other cause."""
    if job.being_ended:
        return tuple(lost_nodes(attempt.nodes, attempt.start))
    ranks, count = _rank_count(run), _node_count()
    silent = [
        node
        for node in range(count)
        if not any(rank in codes for rank in range(ranks) if rank * count // ranks == node)
    ]
    if not silent or srun_status == 0 or count == 1:
        return ()
    # No rank of some node has recorded how it ended. Slurm takes minutes to notice a lost node
    # (SlurmdTimeout), so the nodes are probed. Their names come in the order of the ranks.
    names = hostnames(attempt.nodes)
    answers = nodes_that_see(run, count)
    if len(names) != count or not answers:
        return ()  # Slurm does not answer, so nothing is known about any node
    return tuple(names[node] for node in silent if names[node] not in answers)


def _unusable_nodes(run: Path, attempt: Attempt, codes: dict[int, int]) -> tuple[str, ...]:
    """Nodes with a rank that found no GPU."""
    unusable = [rank for rank, code in codes.items() if code == EXIT_BAD_NODE]
    names, ranks = hostnames(attempt.nodes) if unusable else [], _rank_count(run)
    return tuple(sorted({names[rank * len(names) // ranks] for rank in unusable if names}))


def _rank_count(run: Path) -> int:
    """From the manifest: Slurm does not always set SLURM_NTASKS."""
    return int((read_json(RunPaths(run).manifest) or {}).get("world_size", 0))


def _node_count() -> int:
    return int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))


def _say(text: str) -> None:
    print(f"alignkd: {text}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> None:
    match arguments:
        case ["begin", run]:
            print(begin_attempt(Path(run)))
        case ["end", run, status]:
            print(end_attempt(Path(run), int(status)))
        case ["chained", run, job]:
            follow(Path(run), job)
        case _:
            sys.exit(
                "usage: python -m launcher.backends.slurm.batch begin RUN | end RUN STATUS | chained RUN JOB"
            )


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the job script was killed; what matters is in files
        main(sys.argv[1:])
