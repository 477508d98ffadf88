"""``alignkd plan``: what a run needs, before anything queues."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from alignkd.errors import UserError
from launcher.cli.framework import Commands
from launcher.cli.options import ConfigFile, GpuMemory, Json, Overrides, Stage, make_console, memory_option

plans = Commands()


@plans.command()
def plan(
    config: ConfigFile = Path("alignkd.yaml"),
    nodes: Annotated[int, typer.Option(metavar="N", min=1, help="Number of nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(metavar="N", min=1, help="GPUs per node.")] = 1,
    gpu_memory: GpuMemory = None,
    flops: Annotated[
        float | None,
        typer.Option(
            metavar="FLOPS", min=1, help="Peak FLOP/s of one GPU.", show_default="989e12, H100 in bf16"
        ),
    ] = None,
    utilisation: Annotated[
        float,
        typer.Option(metavar="SHARE", min=0.01, max=1.0, help="Share of the peak that training reaches."),
    ] = 0.4,
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
    from launcher.plan.compute import H100_BF16_DENSE, Speed
    from launcher.plan.show import show_plan
    from launcher.plan.workload import Cluster
    from launcher.run.console import say

    if flops is not None and not math.isfinite(flops):
        raise UserError(f"--flops {flops}: not a speed; valid: a number such as 989e12")
    request = PlanRequest(
        config, Cluster(nodes, gpus_per_node), memory_option(gpu_memory), stage, tuple(overrides or ()), apply
    )
    found = plan_run(request)
    speed, console = Speed(flops or H100_BF16_DENSE, utilisation), make_console(stderr=as_json)
    for note in found.notes:
        say(console, f"note: {note}")
    if as_json:
        print(json.dumps(plan_as_dict(found.plan, found.gpu_memory, found.advised, speed)))
    else:
        show_plan(found.plan, found.gpu_memory, found.advised, speed, make_console())
    if apply:
        for line in apply_advice(request, found):
            say(console, line)
    elif found.gpu_memory is not None and not found.plan.fits(found.gpu_memory):
        raise typer.Exit(1)
