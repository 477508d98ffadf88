"""The Slurm back end: renders the batch and rank scripts of a run and submits them.

Every value goes through one of three quotings: shell words, ``#SBATCH`` lines (which are not shell), and file
name patterns (in which ``%`` means something).
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jinja2

from alignkd.config import Config
from alignkd.config.schema import SlurmSection
from alignkd.errors import AlignkdError, UserError
from launcher.resources import resource_folder

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_PLAIN = re.compile(r"[A-Za-z0-9_./:@=,+%-]+")


def shell_word(value: str) -> str:
    """One word of a shell command. Control characters are refused: no path or name needs them."""
    return shlex.quote(_refuse_control(value))


def sbatch_word(value: str) -> str:
    """One word of an ``#SBATCH`` line: a backslash escapes in quotes too, a bare # is a comment."""
    _refuse_control(value)
    if _PLAIN.fullmatch(value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def file_pattern(folder: Path, pattern: str) -> str:
    """A pattern such as ``rank-%t.log`` in a folder whose own % is meant literally."""
    if "\\" in str(folder):
        raise UserError(
            f"{folder}: Slurm reads no file name patterns in a path with a backslash; rename the folder"
        )
    return f"{str(folder).replace('%', '%%')}/{pattern}"


def _refuse_control(value: str) -> str:
    if _CONTROL.search(value):
        raise UserError(f"{value!r}: a control character (a newline, say) cannot go into a job script")
    return value


def render_scripts(config: Config, run: Path, nodes: int, gpus_per_node: int) -> dict[str, str]:
    """``job.sbatch`` and ``rank.sh`` of a run whose folder will be ``run`` (absolute)."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(resource_folder("slurm")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # shell, not HTML; every value below is quoted for its place
    )
    python = Path(sys.executable)
    values = {
        "directives": _directives(config.slurm, run, nodes, gpus_per_node),
        "srun_options": " ".join(_srun_options(config.slurm, run, nodes, gpus_per_node)),
        "rank_script": shell_word(str(run / "rank.sh")),
        "run": shell_word(str(run)),
        "python": shell_word(str(python)),
        "bin_folder": shell_word(str(python.parent)),
        "gpus_per_node": gpus_per_node,
    }
    return {name: templates.get_template(f"{name}.j2").render(values) for name in ("job.sbatch", "rank.sh")}


def _directives(slurm: SlurmSection, run: Path, nodes: int, gpus_per_node: int) -> list[str]:
    options: list[tuple[str, str | int | None]] = [
        ("job-name", run.name),
        ("account", slurm.account),
        ("partition", slurm.partition),
        ("qos", slurm.qos),
        ("constraint", slurm.constraint),
        ("time", slurm.time_limit),
        ("nodes", nodes),
        ("ntasks-per-node", gpus_per_node),
        ("gpus-per-node", gpus_per_node),
        ("cpus-per-task", slurm.cpus_per_task),
        ("output", file_pattern(run / "logs", "slurm-%j.log")),
        ("open-mode", "append"),  # else a requeue cuts the log
        # To every process of the steps, not to this script (no `B:`): the ranks save by themselves.
        ("signal", f"USR1@{slurm.signal_seconds}"),
    ]
    lines = [f"--{name}={sbatch_word(str(value))}" for name, value in options if value is not None]
    # A preempted or lost job starts again by itself: ranks go on from the newest checkpoint.
    return [*lines, "--requeue"]


def _srun_options(slurm: SlurmSection, run: Path, nodes: int, gpus_per_node: int) -> list[str]:
    options = [
        f"--nodes={nodes}",
        f"--ntasks={nodes * gpus_per_node}",
        f"--ntasks-per-node={gpus_per_node}",
        # Slurm 22.05 to 23.02 do not pass it on from the job.
        *([f"--cpus-per-task={slurm.cpus_per_task}"] if slurm.cpus_per_task is not None else []),
        "--kill-on-bad-exit=1",
        "--mpi=none",
        "--export=ALL",  # under `sbatch --export=NONE` a rank would have no PATH
        f"--output={file_pattern(run / 'logs', 'rank-%t.log')}",
        "--open-mode=append",
    ]
    return [shell_word(option) for option in options]


def slurm_answers() -> bool:
    """Does a Slurm controller answer from here?"""
    if shutil.which("scontrol") is None or shutil.which("sbatch") is None:
        return False
    try:
        done = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0 and "UP" in done.stdout


def submit(run: Path) -> str:
    """Submit the run's job; returns the job id. Raises AlignkdError with what sbatch said."""
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on PATH: this is no Slurm login node; use --backend local")
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(run / "job.sbatch")], capture_output=True, text=True, timeout=120
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise AlignkdError(f"sbatch did not answer: {error}") from error
    if done.returncode != 0:
        raise AlignkdError(f"sbatch refused {run / 'job.sbatch'}:\n{done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]  # `--parsable` prints id[;cluster]
