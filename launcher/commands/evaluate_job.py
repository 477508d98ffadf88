"""``alignkd eval ... --nodes N``: the same evaluation as a Slurm job, on its own or after a training run.

The folder of the answers holds the job's script under the name that a run's has: the job is found in the
queue, and made to wait for a run's newest job, as that of a next stage is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from alignkd.config import load_run_config
from alignkd.config.slurm_section import SlurmSection
from alignkd.errors import AlignkdError, ConfigError, UserError
from alignkd.evaluate.options import EvalOptions, write_options
from alignkd.evaluate.scoring import check_data
from alignkd.run_folder.paths import RunPaths
from launcher.backends.devices import usual_gpus_per_node
from launcher.backends.slurm.client import queued_jobs, slurm_is_installed
from launcher.backends.slurm.preflight import script_problems
from launcher.backends.slurm.submission import submit
from launcher.commands.evaluate import absolute
from launcher.render.container_mounts import container_problems
from launcher.render.job_scripts import render_evaluation
from launcher.run.folder import write_job
from launcher.run.site import read_site


@dataclass(frozen=True)
class JobSize:
    nodes: int
    gpus_per_node: int | None = None  # ranks per node; None: slurm.gpus_per_node, or 1


def submit_evaluation(
    options: EvalOptions, size: JobSize, partition: str | None, time_limit: str | None, cpu: bool
) -> str:
    """Submit the evaluation, and return the job's id. A later submission resumes it.

    Raises UserError for a wrong request, before anything is written, and while a job for the same folder is
    queued or running.
    """
    slurm = _settings((Path(model.folder) for model in options.models), partition, time_limit, cpu)
    options.check(in_this_python=slurm.python is None and slurm.container.kind == "none")
    check_data(options.chosen_tasks(), Path(options.data))
    options = absolute(options)
    out = Path(options.out)
    scripts = checked_scripts(slurm, options, size)
    jobs = queued_jobs(out)
    if jobs is None:
        raise AlignkdError(f"{out}: Slurm does not answer, so a job may be writing there; try again later")
    if jobs:
        raise UserError(
            f"{out}: job {jobs[0].id} is {jobs[0].state.lower()} already; wait for its end, or give another "
            "--out"
        )
    write_evaluation(options, scripts)
    return submit(out)


def checked_scripts(slurm: SlurmSection, options: EvalOptions, size: JobSize) -> dict[str, str]:
    """The scripts, by file name; ``options`` have absolute paths. Raises UserError with every reason why the
    job could not run."""
    if not slurm_is_installed():
        raise UserError("sbatch is not on PATH: this is not a Slurm login node")
    name = f"eval-{options.models[0].name}"
    ranks_per_node = size.gpus_per_node or usual_gpus_per_node(slurm)
    scripts = render_evaluation(slurm, name, Path(options.out), size.nodes, ranks_per_node)
    places = {f"model {model.name}": Path(model.folder) for model in options.models}
    places |= {"--data": Path(options.data), "--out": Path(options.out)}
    if options.own is not None and options.own.image_folder is not None:
        places["--image-folder"] = Path(options.own.image_folder)
    problems = script_problems(slurm, size.nodes, scripts, container_problems(slurm, places))
    if problems:
        raise ConfigError("job of the evaluation", problems)
    return scripts


def write_evaluation(options: EvalOptions, scripts: dict[str, str]) -> None:
    """Write what the job reads. ``options`` have absolute paths."""
    write_options(replace(options, as_json=False))  # scores.json holds the same, and the log shows the table
    write_job(Path(options.out), scripts)


def _settings(
    models: Iterable[Path], partition: str | None, time_limit: str | None, cpu: bool
) -> SlurmSection:
    """Those of the first run among the models, or of the site; options come first."""
    config = _first_config(models)
    if config is None:
        found = SlurmSection.model_validate(read_site().get("slurm", {}))
    else:
        found = load_run_config(config).slurm
    return with_options(found, partition, time_limit, cpu)


def with_options(
    found: SlurmSection, partition: str | None, time_limit: str | None, cpu: bool
) -> SlurmSection:
    """The settings with what the command's options change. Raises UserError."""
    if cpu:
        found = found.model_copy(update={"gpu_option": "none"})
    given = {"--partition": ("partition", partition), "--time": ("time_limit", time_limit)}
    for option, (key, value) in given.items():
        if value is None:
            continue
        try:
            SlurmSection.model_validate({key: value})
        except ValidationError:
            form = SlurmSection.model_fields[key].description
            raise UserError(f"{option} {value}: not valid" + (f"; valid: {form}" if form else "")) from None
        found = found.model_copy(update={key: value})
    return found


def _first_config(models: Iterable[Path]) -> Path | None:
    """Of a run folder, or of the run whose export is the model."""
    for model in map(Path.absolute, models):
        runs = [model, model.parent] if RunPaths(model.parent).student == model else [model]
        for run in runs:
            if RunPaths(run).config.is_file():
                return RunPaths(run).config
    return None
