"""The ``alignkd`` command, put together from the modules beside this one.

A command imports what it needs when it runs: `alignkd --help` must not wait for the imports of all of them.
"""

from __future__ import annotations

from typing import Annotated

import typer

from alignkd import __version__
from launcher.cli.cache import caches
from launcher.cli.checks import checks
from launcher.cli.ckpt import ckpt
from launcher.cli.evaluate import evaluations
from launcher.cli.framework import Root
from launcher.cli.models import models
from launcher.cli.plan import plans
from launcher.cli.report import reports
from launcher.cli.runs import runs
from launcher.cli.start import start

app = typer.Typer(
    cls=Root,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Distil a large vision-language model into a small one (Align-KD).",
)
app.add_typer(ckpt, name="ckpt")
for commands in (start, plans, caches, runs, models, evaluations, reports, checks):
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
    """Entry point of the command."""
    app()
