"""Submit the job of a run: as a first job, after the previous stage, or to continue the run."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from alignkd.errors import AlignkdError, UserError
from alignkd.run_folder.atomic_files import read_json
from alignkd.run_folder.paths import RunPaths
from launcher.backends.slurm.client import (
    clean_environment,
    queued_jobs,
    run_slurm_command,
    slurm_is_installed,
)

_SECONDS = 120
# Defaults that sites have their users put into the login shell, and the options that they stand for. sbatch
# prefers a variable to a line of the script, but what a run's configuration sets must hold.
_SITE_DEFAULTS = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_RESERVATION": "reservation",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_TIMELIMIT": "time",
}


def submission_environment(script: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment for ``sbatch``: without a surrounding job, but with the defaults of the login shell for
    what the script leaves open."""
    options = set(re.findall(r"^#SBATCH --([a-z-]+)", script, re.MULTILINE))
    kept = {
        name: environment[name]
        for name, option in _SITE_DEFAULTS.items()
        if name in environment and option not in options
    }
    return {**clean_environment(environment), **kept}


def submit(run: Path, options: Sequence[str] = ()) -> str:
    """Submit the run's job; returns the job id. Raises AlignkdError with sbatch's own message."""
    if not slurm_is_installed():
        raise UserError("sbatch is not on PATH: this is not a Slurm login node; use --backend local")
    script = RunPaths(run).job_script
    done = _sbatch(("--parsable", *options, str(script)), script)
    if done.returncode != 0:
        raise AlignkdError(f"sbatch refused {script}:\n{done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]  # `--parsable` prints id[;cluster]


def can_run_without(run: Path, nodes: str) -> bool:
    """Could Slurm run the job without these nodes (``n1,n3``)? False also when it does not answer."""
    script = RunPaths(run).job_script
    try:
        return _sbatch(("--test-only", f"--exclude={nodes}", str(script)), script).returncode == 0
    except AlignkdError:
        return False


def _sbatch(arguments: Sequence[str], script: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["sbatch", *arguments], capture_output=True, text=True, errors="replace", timeout=_SECONDS,
            env=submission_environment(script.read_text(encoding="utf-8")),
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise AlignkdError(f"sbatch did not answer: {error}") from error


def retarget_dependency(run: Path, job: str) -> bool:
    """Make the stage that waits for ``run`` wait for ``job``: a resumed or chained job has a new id.

    False when Slurm does not answer, or refuses.
    """
    following = (read_json(RunPaths(run).next_stage) or {}).get("run")
    if following is None:
        return True
    jobs = queued_jobs(Path(following))
    if jobs is None:
        return False
    changes = [
        run_slurm_command("scontrol", "update", f"JobId={waiting.id}", f"Dependency=afterok:{job}")
        for waiting in jobs
        if waiting.state == "PENDING"
    ]
    return None not in changes
