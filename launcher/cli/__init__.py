"""The ``alignkd`` command: typer only, no logic."""

from launcher.cli.app import main

__all__ = ["main"]
