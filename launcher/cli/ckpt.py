"""``alignkd ckpt``: list, verify and convert the checkpoints of a run."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from launcher.run.checkpoints import CheckpointFacts, checkpoint_table, list_checkpoints, step_of

ckpt = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look after a run's checkpoints.")


@ckpt.command("list")
def ckpt_list(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the checkpoints of a run."""
    _show_checkpoints(run, list_checkpoints(run, verify=False), as_json)


@ckpt.command("verify")
def ckpt_verify(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Hash every file of every checkpoint.

    The exit code is 1 when one is broken.
    """
    console = Console(stderr=True)
    facts = list_checkpoints(run, verify=True, progress=lambda name: console.print(f"reading {name}"))
    _show_checkpoints(run, facts, as_json)
    raise typer.Exit(int(any(row.state == "broken" for row in facts)))


@ckpt.command("convert")
def ckpt_convert(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    step: Annotated[int | None, typer.Option(help="Checkpoint; default: the newest.")] = None,
) -> None:
    """Convert a checkpoint for another number of ranks.

    A resume does that by itself.
    """
    chosen = step_of(run, step)
    with redirect_stdout(sys.stderr):
        from alignkd.checkpoint.universal import convert_by_hand

        folder, made = convert_by_hand(run, chosen)
    print(f"wrote {folder}" if made else f"{folder} is there and whole")


def _show_checkpoints(run: Path, facts: list[CheckpointFacts], as_json: bool) -> None:
    if as_json:
        print(json.dumps([row.as_dict() for row in facts]))
    elif not facts:
        print(f"{run}: no checkpoint yet; what it is doing: alignkd status {shlex.quote(str(run))}")
    else:
        Console().print(checkpoint_table(facts))
