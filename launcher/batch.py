"""``python -m launcher.batch begin|end|chained RUN``: what ``job.sbatch`` asks on the node that it runs on.

``begin`` prints ``run ATTEMPT`` or ``exit CODE``; ``end`` prints ``restart 0``, ``wait SECONDS`` or
``exit CODE``; ``chained`` tells the stage that waits for this run which job to wait for now. Everything for
people goes to stderr, which is the job's log.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

from alignkd.errors import EXIT_OK, EXIT_SAVED_ON_USR1, EXIT_USER_ERROR
from launcher.attempts import (
    STOP,
    begin,
    close,
    exit_codes,
    fruitless_restarts,
    newest_step,
    open_attempt,
)
from launcher.files import read_json
from launcher.lifecycle import Action, Evidence, Reason, decide
from launcher.ranks import log_path
from launcher.slurm import is_running, job_state, queue_seconds
from launcher.stages import hand_on
from launcher.verdict import failure_report, first_failure

LATE_SECONDS = 60.0


def begin_attempt(run: Path) -> str:
    job = os.environ["SLURM_JOB_ID"]
    if (read_json(run / "result.json") or {}).get("status") == "done":
        _say(f"{run} is done already")
        return f"exit {EXIT_OK}"
    other = open_attempt(run)
    if other is not None and other.job != job and is_running(other.job):
        _say(f"{run}: job {other.job} is training this run; two would write the same checkpoints")
        return f"exit {EXIT_USER_ERROR}"
    if (run / STOP).exists():
        (run / STOP).unlink()
        if "SLURM_RESTART_COUNT" in os.environ:
            _say("stopped while it was queued; go on with `alignkd resume`")
            return f"exit {EXIT_SAVED_ON_USR1}"
    attempt = begin(run, job, os.environ.get("SLURM_JOB_NODELIST", ""), queue_seconds(job))
    _say(f"attempt {attempt.number} on {attempt.nodes}, from step {attempt.first_step}")
    return f"run {attempt.number}"


def end_attempt(run: Path, srun_status: int) -> str:
    attempt = open_attempt(run)
    if attempt is None:
        _say(f"{run}: no attempt is open")
        return f"exit {srun_status}"
    codes = _all_codes(run, srun_status)
    decision = decide(
        Evidence(
            codes=codes,
            srun_status=srun_status,
            result=(read_json(run / "result.json") or {}).get("status"),
            progressed=newest_step(run) > attempt.first_step,
            stop_requested=(run / STOP).exists(),
            fruitless_before=fruitless_restarts(run),
            max_restarts=int(os.environ.get("ALIGNKD_MAX_RESTARTS", "3")),
            job=job_state(attempt.job),
        )
    )
    closed = close(run, attempt, decision.reason)
    (run / STOP).unlink(missing_ok=True)
    _say(
        f"attempt {closed.number}: {decision.reason} at step {closed.last_step}, saved {closed.saved_step}: "
        f"{decision.why}"
    )
    failed = first_failure(codes)
    if failed is not None and decision.reason in (Reason.CRASHED, Reason.BAD_INPUT):
        _say(failure_report(failed, codes[failed], log_path(run / "logs", failed)))
    if decision.action is Action.RESTART and "ALIGNKD_RUN" in os.environ:
        _say(f"this allocation is not requeued; go on with: alignkd resume {run}")
        return f"exit {EXIT_SAVED_ON_USR1}"
    return f"{decision.action} {decision.value}"


def _all_codes(run: Path, srun_status: int) -> dict[int, int]:
    """Exit codes of the ranks. A shared file system may show another node's files late."""
    ranks = int(os.environ.get("SLURM_NTASKS", "0"))
    end = time.monotonic() + LATE_SECONDS
    while len(codes := exit_codes(run)) < ranks and srun_status == 0 and time.monotonic() < end:
        time.sleep(0.5)
    return codes


def _say(text: str) -> None:
    print(f"alignkd: {text}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> None:
    match arguments:
        case ["begin", run]:
            print(begin_attempt(Path(run)))
        case ["end", run, status]:
            print(end_attempt(Path(run), int(status)))
        case ["chained", run, job]:
            hand_on(Path(run), job)
        case _:
            sys.exit("usage: python -m launcher.batch begin RUN | end RUN STATUS | chained RUN JOB")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the job script was killed; what matters is written down
        main(sys.argv[1:])
