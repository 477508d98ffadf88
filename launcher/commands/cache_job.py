"""``alignkd cache CONFIG --nodes N``: write a cache of the teacher in a Slurm job; never beside another."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from alignkd.config import Config
from alignkd.errors import ConfigError, UserError
from launcher.backends.devices import usual_gpus_per_node
from launcher.backends.node_probe import read_places
from launcher.backends.slurm.client import slurm_is_installed
from launcher.backends.slurm.preflight import script_problems
from launcher.backends.slurm.submission import submit
from launcher.commands.cache import checked_folder, describe, finished_manifest
from launcher.commands.cache_request import refuse_beside_job, request
from launcher.commands.evaluate_job import JobSize
from launcher.render.container_mounts import container_problems
from launcher.render.job_scripts import render_cache
from launcher.run.console import say
from launcher.run.folder import write_job


def folder_to_write(config: Config, console: Console) -> Path | None:
    """The absolute folder of a cache that is to be written, here or by a job; None, after a line that says
    so, when it is finished.

    Raises UserError for whatever can be known to be wrong, and while a job for the folder is queued or
    running.
    """
    folder = checked_folder(config)
    finished = finished_manifest(folder)
    if finished is not None:
        say(console, f"{folder} is finished: {describe(finished)}")
        return None
    refuse_beside_job(folder)
    return folder


def submit_cache(folder: Path, config: Config, size: JobSize) -> str:
    """Submit the job, and return its id. A later submission resumes it.

    Raises UserError for a wrong request, before anything is written.
    """
    if not slurm_is_installed():
        raise UserError("sbatch is not on PATH: this is not a Slurm login node")
    slurm = config.slurm
    ranks_per_node = size.gpus_per_node or usual_gpus_per_node(slurm)
    scripts = render_cache(slurm, f"cache-{folder.name}", folder, size.nodes, ranks_per_node)
    places = {place.key: place.path for place in read_places(config)} | {"teacher.cache": folder}
    problems = script_problems(slurm, size.nodes, scripts, container_problems(slurm, places))
    if problems:
        raise ConfigError("job of the cache", problems)
    with request(folder, config):
        write_job(folder, scripts)
        return submit(folder)
