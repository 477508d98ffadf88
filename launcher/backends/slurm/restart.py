"""Bring a run back: requeue its job or, where that is impossible, submit one that follows it.

The controller may be silent or refuse at any moment (a restart of slurmctld, a failover, a busy hour): every
command is repeated until the deadline, and silence is never taken for an answer.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from alignkd.errors import EXIT_OK, EXIT_SAVED_ON_TERM, EXIT_SAVED_ON_USR1, AlignkdError
from alignkd.run_folder.atomic_files import read_json, write_json, write_text_atomic
from alignkd.run_folder.paths import RunPaths
from launcher.backends.slurm import script
from launcher.backends.slurm.client import queued_jobs, run_slurm_command
from launcher.backends.slurm.job_facts import job_state
from launcher.backends.slurm.lifecycle import JobState
from launcher.backends.slurm.script import asked, say
from launcher.backends.slurm.submission import can_run_without, retarget_dependency, submit

REQUEUE_TRIES = 3  # that Slurm refuses while it answers otherwise
SUBMIT_TRIES = 20
_FIRST_PAUSE, _LONGEST_PAUSE = 2.0, 60.0


def restart(run: Path, job: str, suspects: Sequence[str], deadline: float) -> int:
    """Requeue ``job``, or submit the job that follows it; returns the exit code of this one.

    ``suspects`` are nodes to keep away from, if others are left. ``deadline`` is of ``time.monotonic``.
    """
    requeues = submissions = 0
    seconds = _FIRST_PAUSE
    excluded: str | None = None
    while time.monotonic() < deadline and submissions < SUBMIT_TRIES:
        state = job_state(job)
        if state is None:
            say("Slurm does not answer; the restart waits for it")
        elif state.requeued:
            _exclude(job, excluded)
            return EXIT_OK
        elif state.ended_for_good:
            say("the job was cancelled in the meantime")
            return EXIT_SAVED_ON_TERM
        else:
            excluded = excluded or _excluded(run, state, suspects)
            if state.requeueable and requeues < REQUEUE_TRIES:
                if run_slurm_command("scontrol", "requeue", job) is not None:
                    _exclude(job, excluded)
                    return EXIT_OK
                requeues += 1
                say(f"`scontrol requeue {job}` failed ({requeues} of {REQUEUE_TRIES})")
            elif (waiting := queued_jobs(run)) is not None:
                following = next((other.id for other in waiting if other.id != job), None)
                if following is None:
                    following = _submit(run, job, excluded or state.excluded)
                if following is not None:
                    _follow(run, following)
                    return EXIT_SAVED_ON_USR1  # not 0: what waits for this job with `afterok` must not start
                submissions += 1
        script.pause(seconds)
        seconds = min(2 * seconds, _LONGEST_PAUSE)
    say(f"given up; continue with: alignkd resume {shlex.quote(str(run))}")
    return EXIT_SAVED_ON_USR1


def _excluded(run: Path, state: JobState, suspects: Sequence[str]) -> str | None:
    """The job's list of excluded nodes with ``suspects`` added; None for no change, also where the job could
    not run then."""
    if not suspects:
        return None
    nodes = ",".join(filter(None, (state.excluded, *suspects)))
    if can_run_without(run, nodes):
        say(f"excluded from the next start: {', '.join(suspects)}")
        return nodes
    say(f"{', '.join(suspects)}: not excluded from the next start, as Slurm has too few other nodes")
    return None


def _exclude(job: str, nodes: str | None) -> None:
    """For a job that has just been requeued: Slurm refuses it earlier."""
    tries = 0 if nodes is None else 3
    for _ in range(tries):
        if run_slurm_command("scontrol", "update", f"JobId={job}", f"ExcNodeList={nodes}") is not None:
            return
        script.pause(_FIRST_PAUSE)
    if tries:
        say(f"Slurm did not accept the list of excluded nodes: {nodes}")


def _submit(run: Path, job: str, excluded: str | None) -> str | None:
    options = [f"--dependency=afterany:{job}", *([f"--exclude={excluded}"] if excluded else [])]
    try:
        following = submit(run, options)
    except AlignkdError as error:
        say(str(error))
        return None
    say(f"job {following} continues the run")
    return following


def _follow(run: Path, job: str) -> None:
    """``job`` will continue the run, unless somebody has asked for its end in the meantime.

    A file system that fails must not keep the rest from being done: ``job`` is in the queue already.
    """
    if asked(run) is None:  # a stop that comes after this finds the job in the queue
        with contextlib.suppress(OSError):
            write_json(RunPaths(run).job, {**(read_json(RunPaths(run).job) or {}), "job": job})
        for _ in range(SUBMIT_TRIES):
            if retarget_dependency(run, job):
                return
            script.pause(_FIRST_PAUSE)
        say(f"the next stage does not wait for job {job}: Slurm did not accept the new dependency")
        return
    with contextlib.suppress(OSError):
        write_text_atomic(RunPaths(run).stop, f"USR1 {job}\n")  # should scancel fail, the job reads it
    if run_slurm_command("scancel", job) is not None:
        with contextlib.suppress(OSError):
            RunPaths(run).stop.unlink(missing_ok=True)
    say(f"job {job}, which was to continue the run, is cancelled; continue with `alignkd resume`")
