"""The right to write a cache, and what its ranks read: one start at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from alignkd.config import Config, dump_config
from alignkd.errors import AlignkdError, UserError, raise_if_passing
from alignkd.run_folder.atomic_files import write_text_atomic
from alignkd.run_folder.paths import RunPaths
from alignkd.teacher_cache.folder import CachePaths
from launcher.backends.slurm.client import queued_jobs, slurm_is_installed
from launcher.run.lock import only_holder


def refuse_beside_job(folder: Path) -> None:
    """Raises UserError while a job for the cache is queued or running: a second writer would remove what the
    first is writing."""
    jobs = queued_jobs(folder) if slurm_is_installed() else []
    if jobs is None and RunPaths(folder).job_script.exists():
        raise AlignkdError(f"{folder}: Slurm does not answer, so a job may be writing there; try again later")
    if jobs:
        raise UserError(f"{folder}: job {jobs[0].id} is {jobs[0].state.lower()} already; wait for its end")


@contextlib.contextmanager
def request(folder: Path, config: Config) -> Iterator[None]:
    """Write what the ranks read, and keep every other start away: hold this until a job is submitted or,
    without a queue, until the ranks have ended.

    Raises UserError beside another start, and where the folder cannot be written.
    """
    refusal = f"{folder}: another `alignkd cache` is writing this cache; wait for its end, or stop it"
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(only_holder(CachePaths(folder).lock, refusal))
            refuse_beside_job(folder)  # again: one may have been submitted since the first look
            write_text_atomic(CachePaths(folder).config, dump_config(config))
        except OSError as error:
            raise_if_passing(error, folder)
            raise UserError(f"{folder}: cannot be written ({error})") from None
        yield
