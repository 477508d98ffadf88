"""Render the scripts of a run, an evaluation or a cache from the templates in ``slurm``. Pure."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jinja2

from alignkd.config import Config
from alignkd.config.slurm_section import ContainerSection, SlurmSection
from alignkd.run_folder.paths import ENVIRONMENT_SCRIPT, JOB_SCRIPT, RANK_SCRIPT
from launcher.render.quoting import sbatch_word, shell_word
from launcher.render.resources import resource_folder, source_checkout

# The scripts call modules by name. Raise the number when one of them moves: `alignkd resume` then re-renders
# the scripts of older run folders.
SCRIPT_FORMAT = 3
_MARK = f"# Script format {SCRIPT_FORMAT}; `alignkd resume` re-renders scripts of another format."
_CHECKOUT = source_checkout()


def render_scripts(config: Config, run: Path, nodes: int, gpus_per_node: int) -> dict[str, str]:
    """The three scripts of a run whose folder will be ``run`` (absolute), by file name."""
    slurm = config.slurm
    directives: list[Option] = [("signal", f"USR1@{slurm.signal_seconds}")]
    values = {
        **_values(slurm, run.name, nodes, gpus_per_node, directives),
        "mark": _MARK,
        "run": shell_word(str(run)),
    }
    names = (JOB_SCRIPT, RANK_SCRIPT, ENVIRONMENT_SCRIPT)
    return {name: _templates().get_template(f"{name}.j2").render(values) for name in names}


def render_evaluation(
    slurm: SlurmSection, name: str, out: Path, nodes: int, gpus_per_node: int
) -> dict[str, str]:
    """The two scripts of an evaluation in the folder ``out`` (absolute), by file name."""
    job = {"what": "evaluation", "program": "alignkd.evaluate"}
    return _render_restartable(slurm, name, out, nodes, gpus_per_node, job)


def render_cache(
    slurm: SlurmSection, name: str, folder: Path, nodes: int, gpus_per_node: int
) -> dict[str, str]:
    """The two scripts that write a cache of the teacher in ``folder`` (absolute), by file name."""
    job = {"what": "cache of the teacher", "program": "alignkd.cache_teacher"}
    return _render_restartable(slurm, name, folder, nodes, gpus_per_node, job)


def _render_restartable(
    slurm: SlurmSection, name: str, out: Path, nodes: int, gpus_per_node: int, job: dict[str, str]
) -> dict[str, str]:
    """Slurm sends no signal before the time limit: what such a job has done is on disk."""
    values = {**_values(slurm, name, nodes, gpus_per_node, []), **job, "out": shell_word(str(out))}
    templates = {JOB_SCRIPT: "restartable.sbatch.j2", ENVIRONMENT_SCRIPT: f"{ENVIRONMENT_SCRIPT}.j2"}
    return {name: _templates().get_template(file).render(values) for name, file in templates.items()}


def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(resource_folder("slurm")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # shell, not HTML: every value is quoted where it is used
    )


def _values(
    slurm: SlurmSection, name: str, nodes: int, gpus_per_node: int, more: list[Option]
) -> dict[str, Any]:
    """What the templates have in common, quoted. ``more`` are directives for this kind of job."""
    directives = _directives(slurm, name, nodes, gpus_per_node, more)
    return {
        "directives": [_line(*option) for option in directives],
        "srun_options": [shell_word(_text(*o)) for o in _srun_options(slurm, nodes, gpus_per_node)],
        "wrapper": [shell_word(word) for word in _wrapper(slurm.container)],
        "container_python": shell_word(slurm.container.python) if slurm.container.kind != "none" else None,
        "python": shell_word(slurm.python or sys.executable),
        # The interpreter finds an editable installation, but not a plain checkout.
        "checkout": None if _CHECKOUT is None else shell_word(str(_CHECKOUT)),
        "ranks_per_node": gpus_per_node,
        "max_restarts": slurm.max_restarts,
        "modules": [shell_word(name) for name in slurm.modules],
        "activate": slurm.activate,
        "variables": {name: _assigned(value) for name, value in _variables(slurm).items()},
        "secrets": list(slurm.secrets),
        "cpu": slurm.gpu_option == "none",
    }


def is_current(script: str) -> bool:
    """Was this script rendered in today's format?"""
    return _MARK in script.splitlines()


Option = tuple[str, str | int | bool | None]


def _text(name: str, value: str | int | bool | None) -> str:
    return f"--{name}" if value is True else f"--{name}={value}"


def _line(name: str, value: str | int | bool | None) -> str:
    return f"--{name}" if value is True else f"--{name}={sbatch_word(str(value))}"


def _given(options: list[Option]) -> list[Option]:
    return [(name, value) for name, value in options if value is not None and value is not False]


def _directives(
    slurm: SlurmSection, name: str, nodes: int, gpus_per_node: int, more: list[Option]
) -> list[Option]:
    own: list[Option] = [
        ("job-name", name),
        ("account", slurm.account),
        ("partition", slurm.partition),
        ("qos", slurm.qos),
        ("reservation", slurm.reservation),
        ("constraint", slurm.constraint),
        ("nodelist", slurm.nodelist),
        ("exclude", slurm.exclude),
        ("time", slurm.time_limit),
        ("nodes", nodes),
        ("ntasks-per-node", gpus_per_node),
        *_gpus(slurm, gpus_per_node),
        ("cpus-per-task", slurm.cpus_per_task),
        ("mem", slurm.memory),
        ("exclusive", slurm.exclusive),
        ("mail-user", slurm.mail_user),
        ("mail-type", ",".join(slurm.mail_type) or None),
        ("output", "/dev/null"),
        ("open-mode", "append"),
        *more,
        ("requeue" if slurm.requeue else "no-requeue", True),
    ]
    kept = [option for option in own if option[0] not in slurm.sbatch_options]
    return _given([*kept, *slurm.sbatch_options.items()])


def _gpus(slurm: SlurmSection, count: int) -> list[Option]:
    typed = f"{slurm.gpu_type}:{count}" if slurm.gpu_type else str(count)
    if slurm.gpu_option == "gres":
        return [("gres", f"gpu:{typed}")]
    return [("gpus-per-node", typed)] if slurm.gpu_option == "gpus-per-node" else []


def _srun_options(slurm: SlurmSection, nodes: int, gpus_per_node: int) -> list[Option]:
    container = slurm.container
    pyxis = container.kind == "pyxis"
    own: list[Option] = [
        ("nodes", nodes),
        ("ntasks", nodes * gpus_per_node),
        ("ntasks-per-node", gpus_per_node),
        ("cpus-per-task", slurm.cpus_per_task),
        ("kill-on-bad-exit", 1),
        ("mpi", "none"),
        ("export", "ALL"),
        ("container-image", container.image if pyxis else None),
        ("container-mounts", ",".join(container.mounts) or None if pyxis else None),
    ]
    kept = [option for option in own if option[0] not in slurm.srun_options]
    return _given([*kept, *slurm.srun_options.items()])


def _wrapper(container: ContainerSection) -> list[str]:
    """The command before the rank script that runs it inside the container."""
    if container.kind != "apptainer":
        return []
    binds = [f"--bind={mount}" for mount in container.mounts]
    return ["apptainer", "exec", "--nv", *binds, str(container.image)]


def _variables(slurm: SlurmSection) -> dict[str, str]:
    # A plain name is a prefix for NCCL, and the whole name for gloo.
    interface = (slurm.network_interface or "").removeprefix("=")
    network = {"NCCL_SOCKET_IFNAME": f"={interface}", "GLOO_SOCKET_IFNAME": interface} if interface else {}
    return {**network, **slurm.export}


def _assigned(value: str) -> str:
    """``NAME==ib0`` is valid, but reads like a comparison."""
    word = shell_word(value)
    return f"'{word}'" if word.startswith("=") else word
