"""``alignkd launch``: from a configuration to a run folder to a back end."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from alignkd.config import Config, load_config, warnings_of
from alignkd.config.combinations import counted
from alignkd.errors import ConfigError
from alignkd.run_folder.atomic_files import read_json
from alignkd.run_folder.paths import RunPaths
from launcher.backends.devices import visible_gpus
from launcher.backends.hostfile import Host
from launcher.backends.local import choose_device, rank_command
from launcher.backends.slurm.client import in_allocation, slurm_answers
from launcher.backends.slurm.preflight import slurm_problems, slurm_warnings, space_problems
from launcher.backends.slurm.stages import check_runs, link, stage_names
from launcher.backends.ssh import write_hosts
from launcher.commands.control import start_run
from launcher.commands.preflight import launch_problems
from launcher.plan.check import check_memory
from launcher.plan.workload import Cluster
from launcher.render.deepspeed import accumulation_steps, batch_split, student_config, teacher_config
from launcher.render.job_scripts import render_scripts
from launcher.run.folder import create_run_folder, run_path
from launcher.run.manifest import Manifest, make_manifest
from launcher.run.progress import duration
from launcher.run.site import read_site

Backend = Literal["auto", "local", "slurm", "ssh"]


@dataclass(frozen=True)
class LaunchRequest:
    config: Path
    nodes: int = 1
    gpus_per_node: int = 1
    backend: Backend = "auto"
    hosts: tuple[Host, ...] = ()  # of the ssh back end
    name: str | None = None
    stage: str | None = None
    stages: str | None = None  # names with commas between them: one after the other
    overrides: tuple[str, ...] = ()
    dry_run: bool = False
    gpu_memory: int | None = None  # bytes of one GPU; None: slurm.gpu_memory, or not known
    skip_memory_check: bool = False


def launch(request: LaunchRequest, console: Console) -> dict[str, Any]:
    """Check, write the run folder, start; with several stages, one run after the other.

    Nothing is written when a check fails. Returns the run folder, the job (None: none was submitted) and the
    exit code; with several stages these of each, and the first exit code that is not 0.
    """
    backend = request.backend
    if backend == "auto":
        backend = "slurm" if slurm_answers() else "local"
    names = stage_names(request.stage, request.stages, request.name)
    configs = _checked_configs(request, names, backend, console)
    runs: list[tuple[Manifest, Path]] = []
    for config in configs:
        manifest, run = write_run(config, request, backend)
        _say_plan(config, manifest, run, console)
        if backend == "ssh":
            write_hosts(run, request.hosts)
        if runs:
            link(runs[-1][1], run)
        runs.append((manifest, run))
    results: list[dict[str, Any]] = []
    for manifest, run in runs:
        if request.dry_run:
            _say_files(run, manifest, console)
            results.append({"run": str(run), "job": None, "code": 0})
            continue
        results.append(_start(run, manifest, results[-1]["job"] if results else None, console))
        if results[-1]["code"] != 0:
            break
    code = results[-1]["code"]
    return results[0] if len(configs) == 1 else {"stages": results, "code": code}


def _checked_configs(
    request: LaunchRequest, names: list[str | None], backend: str, console: Console
) -> list[Config]:
    """The configuration of every stage. Raises ConfigError with the problems of all of them."""
    overrides = list(request.overrides)
    if request.name is not None:
        overrides.append(f"run.name={json.dumps(request.name)}")
    site = read_site()
    configs = [load_config(request.config, overrides, name, site) for name in names]
    paths = [run_path(config) for config in configs]
    check_runs(names, paths)
    problems: list[str] = []
    for index, config in enumerate(configs):
        warnings = warnings_of(config)
        found = launch_problems(config, request.nodes * request.gpus_per_node, paths[:index])
        if not found:
            found += space_problems(config) if index == 0 else []
        if backend == "slurm" and not in_allocation():
            found += slurm_problems(config, request.nodes, request.gpus_per_node)
            warnings += slurm_warnings(config, request.nodes)
        if not found and not request.skip_memory_check and _device(config, request, backend) != "cpu":
            cluster = Cluster(request.nodes, request.gpus_per_node)
            too_much, notes = check_memory(config, cluster, request.gpu_memory, configs[:index])
            found, warnings = found + too_much, warnings + notes
        prefix = f"[stage {names[index]}] " if len(names) > 1 else ""
        problems += [prefix + problem for problem in found]
        for warning in warnings:
            _say(console, f"warning: {prefix}{warning}")
    if problems:
        raise ConfigError(str(request.config), problems)
    return configs


def _start(run: Path, manifest: Manifest, after: str | None, console: Console) -> dict[str, Any]:
    """``after`` is the job of the stage before, which must end well first."""
    code, job = start_run(run, manifest, console, after)
    if job is not None:
        waits = f" (waits for job {after})" if after else ""
        _say(console, f"submitted job {job}{waits}; next: alignkd status {shlex.quote(str(run))}")
    elif code == 0 and (result := read_json(RunPaths(run).result)) is not None:
        _say_result(run, result, console)
    return {"run": str(run), "job": job, "code": code}


def write_run(config: Config, request: LaunchRequest, backend: str) -> tuple[Manifest, Path]:
    """Make the run folder. Raises UserError when it cannot be made."""
    world_size = request.nodes * request.gpus_per_node
    device = _device(config, request, backend)
    manifest = make_manifest(
        config,
        request.nodes,
        request.gpus_per_node,
        accumulation_steps(config.training, world_size),
        backend,
        device,
    )
    scripts = render_scripts(config, run_path(config), request.nodes, request.gpus_per_node)
    run = create_run_folder(
        config,
        manifest,
        student_config(config, world_size, device),
        teacher_config(config, device),
        scripts,
    )
    return manifest, run


def _device(config: Config, request: LaunchRequest, backend: str) -> str:
    if backend == "local":
        return choose_device(request.nodes * request.gpus_per_node, visible_gpus(os.environ))
    return "cpu" if config.slurm.gpu_option == "none" else "auto"


def _say_result(run: Path, result: dict[str, Any], console: Console) -> None:
    _say(console, f"done: {result.get('step')} steps in {duration(float(result.get('seconds') or 0))}")
    first, last = result.get("first") or {}, result.get("last") or {}
    if "loss" in first and "loss" in last:
        _say(console, f"  loss {first['loss']:.4g} -> {last['loss']:.4g} (metrics: {run / 'metrics.jsonl'})")
    _say(console, f"  student: {run / 'student'}")


def _say_plan(config: Config, manifest: Manifest, run: Path, console: Console) -> None:
    training, ranks = config.training, counted(manifest.world_size, "rank")
    _say(console, f"run {run}")
    _say(
        console,
        f"  {counted(manifest.nodes, 'node')} x {manifest.gpus_per_node} = {ranks} ({manifest.backend}); "
        f"{batch_split(training, manifest.world_size)}",
    )
    teacher = f"teacher {config.teacher.placement}" if config.distillation.enabled else "no teacher"
    _say(console, f"  student ZeRO-{config.student.zero_stage}, {teacher}, {training.precision}")
    if manifest.device == "cpu":
        gpus = len(visible_gpus(os.environ))
        _say(console, f"  {ranks} and {counted(gpus, 'GPU')} here: running on the CPU (gloo)")


def _say_files(run: Path, manifest: Manifest, console: Console) -> None:
    for path in sorted(run.rglob("*")):
        depth = len(path.relative_to(run).parts)
        _say(console, f"{'  ' * (depth + 1)}{path.name}{'/' if path.is_dir() else ''}")
    if manifest.backend == "slurm":
        _say(console, f"would run: sbatch {shlex.quote(str(run / 'job.sbatch'))}")
    else:
        _say(console, f"would run {counted(manifest.world_size, 'time')}: {shlex.join(rank_command(run))}")
    _say(console, f"nothing was started; start it with: alignkd resume {shlex.quote(str(run))}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
