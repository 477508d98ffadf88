"""``alignkd cache``: run the teacher once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignkd.errors import UserError
from launcher.cli.framework import Commands
from launcher.cli.options import (
    ConfigFile,
    JobNodes,
    JobPartition,
    JobRanks,
    JobTime,
    Overrides,
    Stage,
    make_console,
    refuse_job_options,
)

caches = Commands()


@caches.command()
def cache(
    config: ConfigFile = Path("alignkd.yaml"),
    ranks: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Processes here, one per GPU.", show_default="1"),
    ] = None,
    nodes: JobNodes = None,
    gpus_per_node: JobRanks = None,
    partition: JobPartition = None,
    time_limit: JobTime = None,
    stage: Stage = None,
    overrides: Overrides = None,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Run the teacher on CPUs, as slurm.gpu_option = none does.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the whole cache and compare it with its hashes.")
    ] = False,
) -> None:
    """Run the teacher once and keep its outputs on disk.

    They go to teacher.cache; a run with teacher.placement = cached reads them. They are its final hidden
    states; with teacher.cache_form = fp8 these take half the space of bf16, and losses differ a little; with
    top_k its most likely tokens are kept instead, for forward KL. The same command resumes where it stopped.
    """
    from alignkd.config import load_config
    from launcher.commands.cache import verify as verify_cache
    from launcher.commands.cache import write_here
    from launcher.run.site import read_site

    refuse_job_options(nodes, gpus_per_node, partition, time_limit)
    if nodes is not None and (ranks is not None or verify):
        raise UserError("--nodes N has --gpus-per-node instead of --ranks, and writes only")
    chosen = [*(overrides or ()), *(["slurm.gpu_option=none"] if cpu else [])]
    settings = load_config(config, chosen, stage, read_site())
    if verify:
        raise typer.Exit(verify_cache(settings, make_console()))
    from launcher.commands.cache_job import folder_to_write, submit_cache
    from launcher.commands.evaluate_job import JobSize, with_options

    folder = folder_to_write(settings, make_console())
    if folder is None:
        return
    if nodes is None:
        raise typer.Exit(write_here(folder, settings, ranks or 1))
    settings = settings.model_copy(
        update={"slurm": with_options(settings.slurm, partition, time_limit, cpu=False)}
    )
    job = submit_cache(folder, settings, JobSize(nodes, gpus_per_node))
    print(f"submitted job {job}; after a time limit or a failure, the same command resumes")
