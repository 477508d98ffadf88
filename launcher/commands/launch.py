"""``alignkd launch``: check a configuration, write its run folder, hand it to a back end."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from alignkd.config import Config, load_config
from alignkd.errors import AlignkdError, ConfigError, UserError
from alignkd.text import listed
from launcher.backends import backend_named, resolve_choice
from launcher.backends.base import Backend, BackendChoice
from launcher.backends.devices import device_of, usual_gpus_per_node
from launcher.commands.control import start_run
from launcher.commands.launch_report import say_files, say_plan, say_started
from launcher.commands.preflight import MemoryCheck, check_stages
from launcher.commands.stages import check_runs, link, stage_names
from launcher.plan.workload import Cluster
from launcher.render.deepspeed import accumulation_steps, student_config, teacher_config
from launcher.render.job_scripts import render_scripts
from launcher.run.console import say
from launcher.run.folder import create_run_folder, run_path
from launcher.run.manifest import make_manifest, read_manifest
from launcher.run.site import read_site

if TYPE_CHECKING:
    from launcher.commands.follow_up import FollowUp


@dataclass(frozen=True)
class LaunchRequest:
    config: Path
    nodes: int | None = None  # None: 1, or all hosts of the hostfile
    gpus_per_node: int | None = None  # None: all slots of a host, or slurm.gpus_per_node, or 1
    backend: BackendChoice = "auto"
    hostfile: Path | None = None
    name: str | None = None
    stage: str | None = None
    stages: str | None = None  # names of stages to run one after the other, separated by commas
    overrides: tuple[str, ...] = ()
    cpu: bool = False  # train on CPUs, as slurm.gpu_option = none does
    dry_run: bool = False
    then_eval: str | None = None  # tasks to evaluate the student on, in a job after the last stage
    eval_data: Path | None = None
    memory: MemoryCheck = field(default_factory=MemoryCheck)


def launch(request: LaunchRequest, console: Console) -> dict[str, Any]:
    """Check the configuration, write the run folder and start the run; stages run one after the other.

    Nothing is written when a check fails. Returns the run folder, the job (None if none was submitted) and
    the exit code; with several stages these of each stage, and the first exit code that is not 0. A stage
    that cannot be started ends the list, with its ``error``. The last one has its ``evaluation``, if any.
    """
    backend_name = resolve_choice(request.backend, request.hostfile)
    backend = backend_named(backend_name)
    hosts = backend.hosts(request.hostfile, request.nodes, request.gpus_per_node)
    stages = _load_stages(request)
    ranks_per_node = request.gpus_per_node or (hosts[0].slots if hosts else _usual_gpus(stages, backend))
    cluster = Cluster(request.nodes or len(hosts) or 1, ranks_per_node)
    problems, warnings = check_stages(stages, backend, cluster, request.memory, request.dry_run)
    for warning in warnings:
        say(console, f"warning: {warning}")
    if problems:
        raise ConfigError(str(request.config), problems)
    follow_up = _follow_up(request, stages[-1][1], cluster, backend)
    runs: list[Path] = []
    for _, config in stages:
        runs.append(write_run(config, cluster, backend_name, replace=request.dry_run))
        backend.prepare(runs[-1], hosts)
        say_plan(config, runs[-1], console)
    for run, following in pairwise(runs):
        link(run, following)
    if follow_up is not None and not request.dry_run:
        follow_up.write()
    results: list[dict[str, Any]] = []
    for run in runs:
        manifest = read_manifest(run)
        if request.dry_run:
            say_files(run, manifest, console)
            results.append({"run": str(run), "job": None, "code": 0})
            continue
        previous = results[-1]["job"] if results else None
        try:
            started = start_run(run, manifest, console, previous)
        except AlignkdError as error:
            if not results:
                raise
            # The stages before it are on their way: their jobs must not go unmentioned.
            say(console, f"{run} was not started: {error}\nlater: alignkd resume {shlex.quote(str(run))}")
            results.append({"run": str(run), "job": None, "code": error.exit_code, "error": str(error)})
            break
        say_started(run, started, previous, console)
        results.append({"run": str(run), "job": started.job, "code": started.code})
        if started.code != 0:
            break
    if follow_up is not None and not request.dry_run:
        results[-1]["evaluation"] = follow_up.submit(results[-1]["job"], console)
        results[-1]["code"] = results[-1]["code"] or results[-1]["evaluation"]["code"]
    elif follow_up is not None:
        say(console, "a dry run keeps nothing of --then-eval; after the run: alignkd eval")
    return results[0] if len(stages) == 1 else {"stages": results, "code": results[-1]["code"]}


def _usual_gpus(stages: Sequence[tuple[str | None, Config]], backend: Backend) -> int:
    """Raises UserError when the stages, which all get the same nodes, do not agree."""
    if not backend.has_queue:
        return 1  # this machine is no node of the cluster
    wanted = {usual_gpus_per_node(config.slurm) for _, config in stages}
    if len(wanted) > 1:
        raise UserError(
            f"slurm.gpus_per_node differs between the stages ({listed(sorted(wanted))}); give --gpus-per-node"
        )
    return wanted.pop()


def _follow_up(request: LaunchRequest, config: Config, cluster: Cluster, backend: Backend) -> FollowUp | None:
    """The evaluation after the last stage. Raises UserError when it could not run."""
    if request.then_eval is None and request.eval_data is None:
        return None
    if request.then_eval is None or request.eval_data is None:
        raise UserError("--then-eval TASKS and --eval-data DIR go together")
    from launcher.commands.follow_up import plan_follow_up  # statistics, which import numpy

    return plan_follow_up(request.then_eval, request.eval_data, config, cluster.gpus_per_node, backend)


def _load_stages(request: LaunchRequest) -> list[tuple[str | None, Config]]:
    """Names and configurations of the stages. Raises UserError when two of them would share a run folder."""
    names = stage_names(request.stage, request.stages, request.name)
    overrides = list(request.overrides)
    if request.name is not None:
        overrides.append(f"run.name={json.dumps(request.name)}")
    if request.cpu:
        overrides.append("slurm.gpu_option=none")
    site = read_site()
    try:
        configs = [load_config(request.config, overrides, name, site) for name in names]
    except ConfigError as error:
        raise _blaming_name(error, request.name) from None
    check_runs(names, [run_path(config) for config in configs])
    return list(zip(names, configs, strict=True))


def _blaming_name(error: ConfigError, name: str | None) -> ConfigError:
    """The user typed --name, not run.name."""
    if name is None:
        return error
    key = re.compile(r"^run\.name = .*?: not valid")
    problems = [key.sub(lambda _: f"--name {name}: not valid", problem) for problem in error.problems]
    return ConfigError(error.source, problems)


def write_run(config: Config, cluster: Cluster, backend: str, replace: bool = False) -> Path:
    """Create the run folder and return it; ``replace`` one that was never started. Raises UserError when that
    fails."""
    device = device_of(config)
    accumulation = accumulation_steps(config.training, cluster.ranks)
    manifest = make_manifest(config, cluster.nodes, cluster.gpus_per_node, accumulation, backend, device)
    return create_run_folder(
        config,
        manifest,
        student_config(config, cluster.ranks, device),
        teacher_config(config, device),
        render_scripts(config, run_path(config), cluster.nodes, cluster.gpus_per_node),
        replace,
    )
