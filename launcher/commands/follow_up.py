"""``alignkd launch ... --then-eval TASKS``: a job that evaluates the student when the run is done."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from alignkd.config import Config
from alignkd.errors import EXIT_FAILED, AlignkdError, UserError
from alignkd.evaluate.options import EvalOptions, ModelChoice, chosen_tasks
from alignkd.evaluate.scoring import check_data
from alignkd.evaluate.tasks.registry import OWN
from alignkd.run_folder.paths import RunPaths
from launcher.backends.base import Backend
from launcher.backends.slurm.client import in_allocation
from launcher.backends.slurm.submission import submit
from launcher.commands.evaluate import absolute
from launcher.commands.evaluate_job import JobSize, checked_scripts, write_evaluation
from launcher.commands.stages import link
from launcher.run.console import say
from launcher.run.folder import run_path


@dataclass(frozen=True)
class FollowUp:
    run: Path
    options: EvalOptions  # with absolute paths
    scripts: dict[str, str]

    @property
    def out(self) -> Path:
        return Path(self.options.out)

    def write(self) -> None:
        """Write the evaluation's folder. From now on its job waits for whatever job continues the run."""
        write_evaluation(self.options, self.scripts)
        link(self.run, self.out)

    def submit(self, after: str | None, console: Console) -> dict[str, Any]:
        """Submit the evaluation, to start when job ``after`` ends well (None: the run was not submitted).

        While a run has failed, its evaluation waits until the run has been resumed. Returns job, folder and
        exit code; an evaluation that sbatch refuses is no exception, as the run is on its way.
        """
        problem = "the run has no job"
        try:
            if after is not None:
                job = submit(self.out, [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=no"])
                say(console, f"submitted job {job} (waits for job {after}): evaluation, into {self.out}")
                return {"job": job, "out": str(self.out), "code": 0}
        except AlignkdError as error:
            problem = str(error)
        later = f"sbatch {shlex.quote(str(RunPaths(self.out).job_script))}"
        say(console, f"the evaluation was not submitted: {problem}\nwhen the run is done: {later}")
        return {"job": None, "out": str(self.out), "code": EXIT_FAILED, "error": problem}


def plan_follow_up(tasks: str, data: Path, config: Config, gpus_per_node: int, backend: Backend) -> FollowUp:
    """An evaluation on one node, with the run's Slurm settings, into ``RUN/eval``.

    Raises UserError for whatever can be known to be wrong with it; writes nothing.
    """
    if not backend.has_queue or in_allocation():
        raise UserError(
            "--then-eval submits a Slurm job, and here nothing is queued: run `alignkd eval` after the run"
        )
    if tasks == OWN:
        raise UserError(
            "--then-eval own: your own questions need more options; use `alignkd eval` after the run"
        )
    check_data(chosen_tasks(tasks, data, None), data)
    run = run_path(config)
    model = ModelChoice(run.name, str(RunPaths(run).student))
    options = absolute(EvalOptions((model,), tasks, str(data), str(RunPaths(run).evaluation)))
    scripts = checked_scripts(config.slurm, options, JobSize(1, gpus_per_node))
    return FollowUp(run, options, scripts)
