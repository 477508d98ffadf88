"""``alignkd ckpt``: list, verify and convert the checkpoints of a run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from launcher.cli.framework import Commands
from launcher.cli.options import Checkpoint, Json, Run, chosen_step, make_console, stdout_is_stderr

if TYPE_CHECKING:
    from launcher.run.checkpoints import CheckpointSummary

ckpt = Commands(no_args_is_help=True, help="List, verify or convert a run's checkpoints.")


@ckpt.command("list")
def ckpt_list(run: Run, as_json: Json = False) -> None:
    """List the checkpoints of a run."""
    from launcher.run.checkpoints import list_checkpoints

    _show(run, list_checkpoints(run, verify=False), as_json)


@ckpt.command("verify")
def ckpt_verify(run: Run, as_json: Json = False) -> None:
    """Hash every file of every checkpoint.

    The exit code is 1 if a checkpoint is broken.
    """
    from launcher.run.checkpoints import list_checkpoints

    console = make_console(stderr=True)
    rows = list_checkpoints(run, verify=True, progress=lambda name: console.print(f"reading {name}"))
    _show(run, rows, as_json)
    raise typer.Exit(int(any(row.state == "broken" for row in rows)))


@ckpt.command("convert")
def ckpt_convert(run: Run, step: Checkpoint = None) -> None:
    """Convert a checkpoint for a different number of ranks.

    Not required: a resume converts by itself.
    """
    from launcher.run.checkpoints import step_of

    number = step_of(run, chosen_step(run, step))  # before torch is imported, which takes seconds
    with stdout_is_stderr():
        from alignkd.checkpoint.universal import convert_by_hand

        folder, written = convert_by_hand(run, number)
    print(f"wrote {folder}" if written else f"{folder} is complete already")


def _show(run: Path, rows: list[CheckpointSummary], as_json: bool) -> None:
    if as_json:
        print(json.dumps([row.as_dict() for row in rows]))
    elif not rows:
        print(f"{run}: no checkpoint yet; see: alignkd status {shlex.quote(str(run))}")
    else:
        from launcher.cli.tables import checkpoint_table

        make_console().print(checkpoint_table(rows))
