"""The Slurm back end: a run is a job, or its batch script inside an allocation that the user holds."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from alignkd.errors import AlignkdError, UserError
from alignkd.run_folder.atomic_files import read_json, write_json, write_text_atomic
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.result import result_status
from alignkd.run_folder.save_times import lead_warning, measured_stop_seconds
from launcher.backends.base import JobEnd, QueuedJob, Started, Stopped, refuse_hostfile
from launcher.backends.hostfile import Host
from launcher.backends.slurm.allocation import run_script_here
from launcher.backends.slurm.client import (
    cancel_job,
    in_allocation,
    jobs_of,
    own_jobs,
    queued_jobs,
    running_jobs,
    signal_ranks,
)
from launcher.backends.slurm.job_facts import job_end
from launcher.backends.slurm.submission import retarget_dependency, submit
from launcher.run.attempts import open_attempt, read_history, slurm_step
from launcher.run.console import say
from launcher.run.manifest import Manifest

if TYPE_CHECKING:
    from rich.console import Console

    from alignkd.config import Config
    from launcher.plan.workload import Cluster


class SlurmBackend:
    has_queue = True

    def hosts(self, hostfile: Path | None, nodes: int | None, gpus_per_node: int | None) -> tuple[Host, ...]:
        refuse_hostfile(hostfile)
        return ()

    def preflight(self, config: Config, cluster: Cluster) -> tuple[list[str], list[str]]:
        if in_allocation():
            return [], []
        from launcher.backends.slurm.preflight import slurm_problems, slurm_warnings

        problems = slurm_problems(config, cluster.nodes, cluster.gpus_per_node)
        return problems, slurm_warnings(config, cluster.nodes)

    def resume_warnings(self, run: Path, config: Config) -> list[str]:
        if in_allocation():
            return []
        from launcher.backends.slurm.preflight import mount_warnings

        return mount_warnings(run, config)

    def prepare(self, run: Path, hosts: Sequence[Host]) -> None:
        """Everything that a job needs is in its scripts."""

    def resize_problems(
        self, run: Path, wanted: Manifest, config: Config, hosts: Sequence[Host]
    ) -> list[str]:
        from launcher.plan.workload import Cluster

        return self.preflight(config, Cluster(wanted.nodes, wanted.gpus_per_node))[0]

    def would_run(self, run: Path, manifest: Manifest) -> str:
        return f"would run: sbatch {shlex.quote(str(RunPaths(run).job_script))}"

    def start(self, run: Path, manifest: Manifest, console: Console, after: str | None = None) -> Started:
        from alignkd.config import load_run_config

        signal_seconds = load_run_config(RunPaths(run).config).slurm.signal_seconds
        if (warning := lead_warning(measured_stop_seconds(run), signal_seconds)) is not None:
            say(console, f"warning: {warning}")
        after = after or _awaited_job(run)
        if in_allocation():
            _record_submission(run, os.environ["SLURM_JOB_ID"])
            return Started(run_script_here(run, console), None)
        # Should that job fail, this one waits until it has been resumed, also where Slurm would cancel it.
        waiting = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=no"] if after else []
        job = submit(run, waiting)
        _record_submission(run, job)
        retarget_dependency(run, job)
        return Started(0, job)

    def check_idle(self, run: Path) -> None:
        own = os.environ["SLURM_JOB_ID"] if in_allocation() else None
        jobs = self.live_jobs(run)
        if jobs is None:
            raise AlignkdError(_silence(run))
        job = next((job for job in jobs if job.script or job.id != own), None)
        if job is not None and job.script:
            raise UserError(f"{run}: job {job.id} is {job.state.lower()} already; see `alignkd status`")
        if job is not None:
            raise UserError(f"{run}: job {job.id} is training it")

    def live_jobs(self, run: Path) -> list[QueuedJob] | None:
        return self.live_jobs_of([run])[0]

    def live_jobs_of(self, runs: Sequence[Path]) -> list[list[QueuedJob] | None]:
        queue = own_jobs()  # one question for all runs: each may take a minute on a busy cluster
        if queue is None:
            return [None for _ in runs]
        found = {run: jobs_of(run, queue) for run in runs}
        # A run in an allocation has a job whose script is not the run's; so has a run of another user.
        open_jobs = {
            run: attempt.job for run in runs if not found[run] and (attempt := open_attempt(run)) is not None
        }
        running = running_jobs(sorted(set(open_jobs.values())))
        if running is None:
            return [None if run in open_jobs else found[run] for run in runs]
        for run, job in open_jobs.items():
            found[run] = [QueuedJob(job, "RUNNING", "None", None, "")] if job in running else []
        return [found[run] for run in runs]

    def end_of(self, job: str) -> JobEnd | None:
        return job_end(job)

    def stop(self, run: Path, jobs: Sequence[QueuedJob]) -> Stopped:
        # The file comes first: it tells the batch script that this USR1 is not a time limit, and ranks that
        # are about to start that they should not.
        _request_stop(run, "USR1", jobs)
        # The queue is read again: a script that has just submitted the run's next job looks for the file
        # afterwards.
        jobs = self.live_jobs(run) or jobs
        running = [job for job in jobs if job.state != "PENDING"]
        for job in jobs:
            if job.state == "PENDING":
                cancel_job(job.id)
        if not running:
            RunPaths(run).stop.unlink(missing_ok=True)
            _record_cancelled(run)
            return Stopped(jobs[0].id, "taken out of the queue")
        for job in running:
            _signal(run, job, "USR1")
        return Stopped(running[0].id, "asked to save and stop")

    def cancel(self, run: Path, jobs: Sequence[QueuedJob]) -> Stopped:
        # The file comes first: scancel is too late for a script that has just decided to restart, which
        # requeues the job or submits the next one all the same. The next start reads the file.
        _request_stop(run, "TERM", jobs)
        jobs = self.live_jobs(run) or jobs
        for job in jobs:
            if job.script:
                cancel_job(job.id)
            else:  # an allocation belongs to the user
                _signal(run, job, "TERM")
        if all(job.state == "PENDING" for job in jobs):
            RunPaths(run).stop.unlink(missing_ok=True)
            _record_cancelled(run)
        if not all(job.script for job in jobs):
            return Stopped(jobs[0].id, "asked the ranks to save and exit; the allocation is kept")
        evaluation = _cancel_evaluation(run)
        if evaluation is None:
            return Stopped(jobs[0].id, "cancelled")
        return Stopped(jobs[0].id, f"cancelled, and its evaluation, job {evaluation.job} {evaluation.action}")

    def cancel_waiting(self, run: Path) -> Stopped | None:
        evaluation = _cancel_evaluation(run)
        if evaluation is None:
            return None
        return Stopped(evaluation.job, f"cancelled the evaluation of the run {evaluation.action}")


def _cancel_evaluation(run: Path) -> Stopped | None:
    """Cancel the evaluation that waits for the run, which would stay in the queue for ever, and say how to
    submit it later.

    A next stage keeps its place, as a run that can be cancelled by itself.
    """
    following = (read_json(RunPaths(run).next_stage) or {}).get("run")
    if following is None or RunPaths(Path(following)).manifest.exists():
        return None
    jobs = queued_jobs(Path(following))
    if jobs is None:
        raise AlignkdError(
            f"{run}: its jobs are cancelled or have ended, but Slurm does not answer, so its evaluation may "
            "still be queued; give `alignkd cancel` again later"
        )
    waiting = [job.id for job in jobs if job.state == "PENDING"]
    for job in waiting:
        cancel_job(job)
    later = f"sbatch {shlex.quote(str(RunPaths(Path(following)).job_script))}"
    return Stopped(waiting[0], f"(when the run is done: {later})") if waiting else None


def _awaited_job(run: Path) -> str | None:
    """The job of the stage before this one, if that has yet to be done.

    Raises UserError when nothing is about to complete it.
    """
    before = (read_json(RunPaths(run).previous_stage) or {}).get("run")
    if before is None or not Path(before).is_dir() or result_status(Path(before)) == "done":
        return None
    jobs = queued_jobs(Path(before))
    if jobs is None:
        raise AlignkdError(_silence(Path(before)))
    if not jobs:
        resume = f"alignkd resume {shlex.quote(before)}"
        raise UserError(f"{run}: the stage before it is neither done nor queued; first: {resume}")
    # Of a run that is just being continued, the new job.
    return max(jobs, key=lambda job: (len(job.id), job.id)).id


def _silence(run: Path) -> str:
    return f"{run}: Slurm does not answer, so a job of the run may be queued or running; try again later"


def _record_submission(run: Path, job: str) -> None:
    """Failures before this moment do not count towards slurm.max_restarts."""
    values = {"job": job, "submitted": time.time(), "attempts_before": len(read_history(run))}
    write_json(RunPaths(run).job, values)


def _record_cancelled(run: Path) -> None:
    """The submitted job leaves no log, which is not a failure."""
    if (values := read_json(RunPaths(run).job)) is not None:
        write_json(RunPaths(run).job, {**values, "cancelled": True})


def _request_stop(run: Path, name: str, jobs: Sequence[QueuedJob]) -> None:
    write_text_atomic(RunPaths(run).stop, " ".join([name, *(job.id for job in jobs)]) + "\n")


def _signal(run: Path, job: QueuedJob, name: str) -> None:
    """Signal the ranks only. In an allocation they are one step of several; the user's shell is another."""
    if job.state in ("COMPLETING", "CONFIGURING"):
        return  # no process can receive it, and scancel fails; the next start reads the file
    step = job.id if job.script else slurm_step(run)
    if step is not None and not signal_ranks(step, name):  # None: they have yet to start, and read the file
        raise AlignkdError(f"scancel could not signal job {step}")
