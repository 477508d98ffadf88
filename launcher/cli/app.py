"""The ``alignkd`` command, put together from the modules beside this one.

A command imports what it needs when it runs: `alignkd --help` must not wait for the imports of all of them.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from alignkd import __version__
from alignkd.errors import AlignkdError, UserError, raise_if_passing, report_error
from launcher.cli.checks import checks
from launcher.cli.ckpt import ckpt
from launcher.cli.evaluate import evaluations
from launcher.cli.models import models
from launcher.cli.plan import plans
from launcher.cli.runs import runs
from launcher.cli.start import start

# The order in which a user comes to need them.
ORDER = (
    *("init", "plan", "launch", "status", "logs", "stop", "resume", "cancel", "list", "ckpt", "export"),
    *("eval", "chat", "probe", "sample-data", "drill", "explain"),
)


class _InOrder(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)


app = typer.Typer(
    cls=_InOrder,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Distil a large vision-language model into a small one (Align-KD).",
)
app.add_typer(ckpt, name="ckpt")
for commands in (start, plans, runs, models, evaluations, checks):
    app.add_typer(commands)  # without a name: its commands become top-level ones


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"alignkd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: errors of the user are one message and an exit code, never a traceback."""
    try:
        app()
    except AlignkdError as error:
        sys.exit(report_error(error))
    except OSError as error:
        if error.filename is None:  # not about a file: a bug of ours
            raise
        sys.exit(report_error(_file_error(error)))


def _file_error(error: OSError) -> AlignkdError:
    """For file errors that no command explained better: a forbidden folder, a full disk, a dead server."""
    try:
        raise_if_passing(error, error.filename)
    except AlignkdError as passing:
        return passing
    return UserError(f"{error.filename}: {error.strerror}")
