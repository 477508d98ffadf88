"""Start a run that has its folder; stop it; cancel it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console

from alignkd.errors import UserError
from alignkd.run_folder.paths import RunPaths
from launcher.backends import backend_named
from launcher.backends.base import Backend, QueuedJob, Started
from launcher.commands.status import inspect_run
from launcher.run.lock import only_launcher
from launcher.run.manifest import Manifest, read_manifest


def start_run(run: Path, manifest: Manifest, console: Console, after: str | None = None) -> Started:
    """Start or resume a run. Without a queue, and inside an allocation, this returns when the run has ended.

    A submitted job starts only if job ``after`` ends well. Raises UserError when another launcher runs it.
    """
    with only_launcher(run):
        RunPaths(run).stop.unlink(missing_ok=True)  # meant for an earlier start
        return backend_named(manifest.backend).start(run, manifest, console, after)


def stop_run(run: Path) -> dict[str, Any]:
    """Ask a run to save and to stop, without a requeue. Raises UserError when it does not run."""
    run, backend, jobs = _found(run)
    if not jobs:
        raise _nothing_to_stop(run)
    job, action = backend.stop(run, jobs)
    return {"run": str(run), "job": job, "action": action}


def cancel_run(run: Path) -> dict[str, Any]:
    """Cancel a run's jobs, or what waits for a run that has ended. The ranks get SIGTERM, and save if the
    cluster grants the time."""
    run, backend, jobs = _found(run)
    done = backend.cancel(run, jobs) if jobs else backend.cancel_waiting(run)
    if done is None:
        raise _nothing_to_stop(run)
    return {"run": str(run), "job": done.job, "action": done.action}


def _nothing_to_stop(run: Path) -> UserError:
    return UserError(f"{run} is {inspect_run(run, []).state}; there is nothing to stop")


def _found(run: Path) -> tuple[Path, Backend, list[QueuedJob]]:
    """The absolute path, the back end and the live jobs of a run."""
    run = Path(os.path.abspath(run))
    backend = backend_named(read_manifest(run).backend)
    jobs = backend.live_jobs(run)
    if jobs is None:
        raise UserError("Slurm does not answer here; run this command on a login node of the cluster")
    return run, backend, jobs
