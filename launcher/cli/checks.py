"""Commands that check a cluster or a batch script: drill, explain."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from alignkd.errors import UserError
from launcher.cli.framework import Commands
from launcher.cli.options import Json, Run, make_console

checks = Commands()


@checks.command()
def drill(
    run: Run,
    steps: Annotated[
        int, typer.Option(metavar="N", min=8, help="Optimizer steps of each of the two short runs.")
    ] = 40,
    preempt_with: Annotated[
        str,
        typer.Option(
            metavar="OPTIONS", help="sbatch options of a job that preempts, such as '--partition=urgent'."
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Prove that a run survives interruptions on this cluster.

    The exit code is 1 if it does not.
    """
    from launcher.commands.drill import drill as run_drill

    findings = []
    try:
        options = shlex.split(preempt_with)
    except ValueError as error:
        raise UserError(
            f"--preempt-with {preempt_with}: {error}; valid: options quoted as in a shell"
        ) from error
    for finding in run_drill(Path(os.path.abspath(run)), steps, make_console(stderr=as_json), options):
        findings.append(finding)
        if not as_json:
            print(f"{'ok ' if finding.ok else 'NOT OK'}  {finding.text}", flush=True)
    if as_json:
        print(json.dumps([vars(finding) for finding in findings]))
    raise typer.Exit(int(not all(finding.ok for finding in findings)))


@checks.command()
def explain(
    script: Annotated[Path, typer.Argument(metavar="SCRIPT", help="Any Slurm batch script.")],
    as_json: Json = False,
) -> None:
    """Find Slurm pitfalls in a batch script.

    The exit code is 1 if there are any.
    """
    from launcher.commands.explain import explain as find_pitfalls

    findings = find_pitfalls(script)
    if as_json:
        print(json.dumps([vars(finding) for finding in findings]))
    for finding in [] if as_json else findings:
        place = f"line {finding.line}" if finding.line else "the script"
        print(f"{place}: {finding.text}\n  {finding.reason}")
    if not findings and not as_json:
        print("no known pitfall found")
    raise typer.Exit(int(bool(findings)))
