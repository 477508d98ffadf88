"""What ``alignkd launch`` tells its user."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console

from alignkd.config import Config
from alignkd.run_folder.atomic_files import read_json
from alignkd.run_folder.paths import RunPaths
from alignkd.text import counted, duration
from launcher.backends import backend_named
from launcher.backends.base import Started
from launcher.render.deepspeed import batch_split
from launcher.run.console import say
from launcher.run.manifest import Manifest, read_manifest


def say_plan(config: Config, run: Path, console: Console) -> None:
    manifest = read_manifest(run)
    training, ranks = config.training, counted(manifest.world_size, "rank")
    say(console, f"run {run}")
    say(
        console,
        f"  {counted(manifest.nodes, 'node')} x {manifest.gpus_per_node} = {ranks} ({manifest.backend}); "
        f"{batch_split(training, manifest.world_size)}",
    )
    teacher = f"teacher {config.teacher.placement}" if config.distillation.enabled else "no teacher"
    say(console, f"  student ZeRO-{config.student.zero_stage}, {teacher}, {training.precision}")
    if manifest.device == "cpu":
        say(console, "  on CPUs (gloo), as --cpu or slurm.gpu_option = none asks")


def say_files(run: Path, manifest: Manifest, console: Console) -> None:
    """For a dry run: the files that were written, and what a start would do."""
    for path in sorted(run.rglob("*")):
        depth = len(path.relative_to(run).parts)
        say(console, f"{'  ' * (depth + 1)}{path.name}{'/' if path.is_dir() else ''}")
    say(console, backend_named(manifest.backend).would_run(run, manifest))
    say(console, f"nothing was started; start it with: alignkd resume {shlex.quote(str(run))}")


def say_started(run: Path, started: Started, previous: str | None, console: Console) -> None:
    """``previous`` is the job of the previous stage. How a run failed was reported when it ended."""
    if started.job is not None:
        waits = f" (waits for job {previous})" if previous else ""
        say(console, f"submitted job {started.job}{waits}; next: alignkd status {shlex.quote(str(run))}")
    elif started.code == 0:
        _say_result(run, console)


def _say_result(run: Path, console: Console) -> None:
    paths = RunPaths(run)
    result = read_json(paths.result)
    if result is None:
        return
    say(console, f"done: {result.get('step')} steps in {duration(float(result.get('seconds') or 0))}")
    first, last = result.get("first") or {}, result.get("last") or {}
    if "loss" in first and "loss" in last:
        say(console, f"  loss {first['loss']:.4g} -> {last['loss']:.4g} (metrics: {paths.metrics})")
    say(console, f"  student: {paths.student}")
