"""Arguments and options that several commands share, and what they do to standard output."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alignkd.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Stage = Annotated[str | None, typer.Option(metavar="NAME", help="Stage of a configuration with stages.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key; repeatable."),
]
GpuMemory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Memory of one GPU, such as 80G.", show_default="slurm.gpu_memory"),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(metavar="N", help="Step of the checkpoint, or `best`.", show_default="the newest"),
]

JobNodes = Annotated[int | None, typer.Option(metavar="N", min=1, help="Submit a Slurm job on N nodes.")]
JobRanks = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Ranks per node, one per GPU (--nodes).",
        show_default="slurm.gpus_per_node, or 1",
    ),
]

JobPartition = Annotated[
    str | None,
    typer.Option(
        "--partition",
        metavar="NAME",
        help="Slurm partition (--nodes).",
        show_default="slurm.partition of the configuration, run or site",
    ),
]
JobTime = Annotated[
    str | None,
    typer.Option(
        "--time",
        metavar="LIMIT",
        help="Time limit (--nodes).",
        show_default="slurm.time_limit of the configuration, run or site",
    ),
]


def refuse_job_options(nodes: int | None, *options: object) -> None:
    """Raises UserError for ``--gpus-per-node``, ``--partition`` or ``--time`` without a job."""
    if nodes is None and any(option is not None for option in options):
        raise UserError("--gpus-per-node, --partition and --time are only for a Slurm job (--nodes N)")


def chosen_step(run: Path, text: str | None) -> int | None:
    """The step that ``--step`` names, whether or not it has a checkpoint. Raises UserError."""
    if text is None:
        return None
    if text == "best":
        from alignkd.run_folder.best import best_step

        return best_step(run)
    if not text.isdecimal():
        raise UserError(f"--step {text}: not a step; valid: a whole number, or `best`")
    return int(text)


def memory_option(text: str | None) -> int | None:
    """Bytes of ``--gpu-memory``. Raises UserError."""
    from launcher.plan.check import memory_bytes

    size = None if text is None else memory_bytes(text)
    if size == 0:
        raise UserError(
            f"--gpu-memory {text}: not a memory size; valid: a number followed by M, G or T (80G)"
        )
    return size


def make_console(stderr: bool = False) -> Console:
    """With NO_COLOR set (no-color.org), neither colours nor bold or dim text."""
    from rich.console import Console

    return Console(stderr=stderr, color_system=None if os.environ.get("NO_COLOR") else "auto")


def stdout_is_stderr() -> AbstractContextManager[object]:
    """DeepSpeed greets on standard output, which is for the result of a command."""
    return redirect_stdout(sys.stderr)
