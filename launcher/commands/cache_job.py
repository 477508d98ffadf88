"""``alignkd cache CONFIG --nodes N``: write a cache of the teacher in a Slurm job."""

from __future__ import annotations

from alignkd.config import Config
from alignkd.errors import AlignkdError, ConfigError, UserError, raise_if_passing
from alignkd.run_folder.paths import RunPaths
from launcher.backends.devices import usual_gpus_per_node
from launcher.backends.node_probe import read_places
from launcher.backends.slurm.client import queued_jobs, slurm_is_installed
from launcher.backends.slurm.preflight import script_problems
from launcher.backends.slurm.submission import submit
from launcher.commands.cache import checked_folder, write_request
from launcher.commands.evaluate_job import JobSize
from launcher.render.container_mounts import container_problems
from launcher.render.job_scripts import render_cache
from launcher.run.folder import write_scripts


def submit_cache(config: Config, size: JobSize) -> str:
    """Submit the job, and return its id. A later submission resumes it.

    Raises UserError for a wrong request, before anything is written, and while a job for the same folder is
    queued or running.
    """
    folder = checked_folder(config)
    if not slurm_is_installed():
        raise UserError("sbatch is not on PATH: this is not a Slurm login node")
    slurm = config.slurm
    ranks_per_node = size.gpus_per_node or usual_gpus_per_node(slurm)
    scripts = render_cache(slurm, f"cache-{folder.name}", folder, size.nodes, ranks_per_node)
    places = {place.key: place.path for place in read_places(config)} | {"teacher.cache": folder}
    problems = script_problems(slurm, size.nodes, scripts, container_problems(slurm, places))
    if problems:
        raise ConfigError("job of the cache", problems)
    jobs = queued_jobs(folder)
    if jobs is None:
        raise AlignkdError(f"{folder}: Slurm does not answer, so a job may be writing there; try again later")
    if jobs:
        raise UserError(f"{folder}: job {jobs[0].id} is {jobs[0].state.lower()} already; wait for its end")
    write_request(folder, config)
    try:
        RunPaths(folder).logs.mkdir(exist_ok=True)
        write_scripts(folder, scripts)
    except OSError as error:
        raise_if_passing(error, folder)
        raise UserError(f"{folder}: cannot be written ({error})") from None
    return submit(folder)
