"""``alignkd init`` and ``alignkd launch``: from nothing to a started run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from launcher.backends.base import BackendChoice
from launcher.cli.framework import Commands
from launcher.cli.options import ConfigFile, GpuMemory, Json, Overrides, Stage, make_console, memory_option

start = Commands()

# Those of alignkd.config.presets, whose import takes long; a test compares them.
PRESET_NAMES = (
    "sample",
    "short",
    "long",
    "short-3b",
    "qwen3-vl-8b-to-2b",
    "smolvlm2-500m-to-256m",
    "llava-1.5-13b-to-7b",
    "internvl3-8b-to-2b",
    "gemma-3-12b-to-4b",
)


@start.command()
def init(
    preset: Annotated[str, typer.Option(metavar="NAME", help=f"Preset: {', '.join(PRESET_NAMES)}.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write.")] = Path("alignkd.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented configuration to start from."""
    from alignkd.config.presets import write_preset

    write_preset(preset, out, force)
    print(f"wrote {out}; its first lines say how to start")


@start.command()
def launch(
    config: ConfigFile = Path("alignkd.yaml"),
    nodes: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Number of nodes.", show_default="1, or all hosts"),
    ] = None,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Ranks per node, one per GPU.",
            show_default="all slots, or slurm.gpus_per_node, or 1",
        ),
    ] = None,
    backend: Annotated[
        BackendChoice,
        typer.Option(
            metavar="NAME",
            help="auto, local, slurm or ssh; auto: ssh with --hostfile, else slurm if installed.",
        ),
    ] = "auto",
    hostfile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Hosts for ssh, one `host slots=N` per line.")
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the run (run.name).")] = None,
    stage: Stage = None,
    stages: Annotated[
        str | None, typer.Option(metavar="A,B", help="Stages to run one after another.")
    ] = None,
    overrides: Overrides = None,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Train on CPUs, as slurm.gpu_option = none does.")
    ] = False,
    gpu_memory: GpuMemory = None,
    skip_memory_check: Annotated[
        bool, typer.Option("--skip-memory-check", help="Launch a run that `alignkd plan` says cannot fit.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write and show the run folder, start nothing.")
    ] = False,
    then_eval: Annotated[
        str | None,
        typer.Option(metavar="TASK,...", help="Tasks of a Slurm job that evaluates the student afterwards."),
    ] = None,
    eval_data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the benchmarks' files (--then-eval).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a configuration, write its run folder and start it."""
    from launcher.commands.launch import LaunchRequest
    from launcher.commands.launch import launch as launch_run
    from launcher.commands.preflight import MemoryCheck

    request = LaunchRequest(
        config,
        nodes,
        gpus_per_node,
        backend,
        hostfile,
        name,
        stage,
        stages,
        tuple(overrides or ()),
        cpu,
        dry_run,
        then_eval,
        eval_data,
        MemoryCheck(memory_option(gpu_memory), skip_memory_check),
    )
    result = launch_run(request, make_console(stderr=as_json))
    if as_json:
        print(json.dumps(result))
    raise typer.Exit(result["code"])
