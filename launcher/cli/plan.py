"""``alignkd plan``: what a run needs, before anything queues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from launcher.cli.framework import Commands
from launcher.cli.options import ConfigFile, GpuMemory, Json, Overrides, Stage, make_console, memory_option

plans = Commands()


@plans.command()
def plan(
    config: ConfigFile = Path("alignkd.yaml"),
    nodes: Annotated[int, typer.Option(metavar="N", min=1, help="Number of nodes.")] = 1,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="GPUs per node.", show_default="slurm.gpus_per_node, or 1"),
    ] = None,
    gpu_memory: GpuMemory = None,
    chip: Annotated[
        Literal["a100", "h100", "h200", "b200"],
        typer.Option(metavar="NAME", help="GPU for the time of a step: a100, h100, h200 or b200."),
    ] = "h100",
    stage: Stage = None,
    overrides: Overrides = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Write the advice and the --set overrides into CONFIG.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the memory, traffic and compute that a run needs.

    If the memory of a GPU is known, it also advises the settings that fit best, and the exit code is 1
    if the run does not fit.
    """
    from launcher.commands.plan import PlanRequest, apply_advice, plan_run
    from launcher.plan.as_dict import plan_as_dict
    from launcher.plan.roofline import CHIPS
    from launcher.plan.show import show_plan
    from launcher.run.console import say

    request = PlanRequest(
        config, nodes, gpus_per_node, memory_option(gpu_memory), stage, tuple(overrides or ()), apply
    )
    found = plan_run(request)
    console = make_console(stderr=as_json)
    for note in found.notes:
        say(console, f"note: {note}")
    if as_json:
        print(json.dumps(plan_as_dict(found.plan, found.gpu_memory, found.advised, CHIPS[chip])))
    else:
        show_plan(found.plan, found.gpu_memory, found.advised, CHIPS[chip], make_console())
    if apply:
        for line in apply_advice(request, found):
            say(console, line)
    elif found.gpu_memory is not None and not found.plan.fits(found.gpu_memory):
        raise typer.Exit(1)
