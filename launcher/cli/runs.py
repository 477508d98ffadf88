"""Commands on runs that have their folder (status, logs, stop, cancel, resume, list) and on scripts."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from alignkd.errors import UserError
from launcher.backends import backend_named
from launcher.cli import tables
from launcher.commands import control
from launcher.commands.explain import explain as find_traps
from launcher.commands.resume import ResumeRequest, resume_run
from launcher.commands.status import RunState, inspect_run
from launcher.run import logs as run_logs
from launcher.run.manifest import read_manifest

runs = typer.Typer(rich_markup_mode=None)

Run = Annotated[Path, typer.Argument(help="Folder of the run.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

ASK_SECONDS = 30.0  # between two questions to Slurm while a log is followed


@runs.command()
def status(
    run: Annotated[Path | None, typer.Argument(help="Folder of the run; default: all in `runs`.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a run is doing, or all runs."""
    if run is None:
        list_runs(Path("runs"), as_json)
        return
    state = _state(Path(os.path.abspath(run)))
    if as_json:
        print(json.dumps(state.as_dict()))
    else:
        tables.show_state(state, Console())


@runs.command("list")
def list_runs(
    folder: Annotated[Path, typer.Argument(help="Parent of the run folders.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Show all runs below a folder."""
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the parent of the run folders")
    states = []
    for path in sorted(folder.glob("*/manifest.json")):
        try:
            states.append(_state(path.parent))
        except UserError as error:  # another tool's manifest.json; the runs beside it are shown all the same
            print(f"left out: {error}", file=sys.stderr)
    if as_json:
        print(json.dumps([state.as_dict() for state in states]))
    elif states:
        Console().print(tables.state_table(states))
    else:
        print(f"no runs in {folder}")


@runs.command()
def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    rank: Annotated[int, typer.Option(min=0, help="Rank.")] = 0,
    attempt: Annotated[int | None, typer.Option(min=1, help="Attempt; default: the last.")] = None,
    errors: Annotated[bool, typer.Option("--errors", help="Show the first error across ranks.")] = False,
    as_json: Json = False,
) -> None:
    """Show the log of a rank."""
    read_manifest(run)
    if follow and (as_json or errors or attempt is not None):
        raise UserError("--follow goes with --rank only")
    if errors:
        _show_errors(run, attempt, as_json)
    elif follow:
        for text in run_logs.follow(run, rank, _Ended(Path(os.path.abspath(run)))):
            print(text, end="", flush=True)
    else:
        lines = run_logs.attempt_lines(run, rank, attempt)
        print(json.dumps({"rank": rank, "lines": lines}) if as_json else "\n".join(lines))


def _show_errors(run: Path, attempt: int | None, as_json: bool) -> None:
    error = run_logs.first_error(run, attempt)
    if as_json:
        print(json.dumps(None if error is None else vars(error)))
    elif error is None:
        print("no attempt has failed" if attempt is None else f"attempt {attempt} has not failed")
    else:
        print(f"attempt {error.attempt}: rank {error.rank} failed first, exit code {error.exit_code}")
        print("\n".join(f"  | {line}" for line in error.lines))


@runs.command()
def stop(run: Run, as_json: Json = False) -> None:
    """Let a run save and stop, without a requeue."""
    _show_action(control.stop_run(run), as_json)


@runs.command()
def cancel(run: Run, as_json: Json = False) -> None:
    """Cancel a run's job."""
    _show_action(control.cancel_run(run), as_json)


@runs.command()
def resume(
    run: Run,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes; default: as before.")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks on each node; default: as before.")
    ] = None,
    hostfile: Annotated[
        Path | None, typer.Option(help="Other hosts, of a run of --backend ssh: one `host slots=N` a line.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(min=1, help="Go back to this checkpoint; newer ones are kept aside.")
    ] = None,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Accept that KEY differs from the checkpoint; may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Go on with a run, on as many nodes or others.

    It starts from the newest checkpoint, or from --step.
    """
    request = ResumeRequest(nodes, gpus_per_node, hostfile, step, tuple(allow_change or ()))
    result = resume_run(run, request, Console(stderr=as_json))
    if as_json:
        print(json.dumps(result))
    elif result["job"]:
        print(f"submitted job {result['job']}; next: alignkd status {shlex.quote(str(run))}")
    raise typer.Exit(result["code"])


@runs.command()
def explain(
    script: Annotated[Path, typer.Argument(help="Any batch script of Slurm.")], as_json: Json = False
) -> None:
    """Find the traps of Slurm in a batch script.

    The exit code is 1 when there are some.
    """
    findings = find_traps(script)
    if as_json:
        print(json.dumps([vars(finding) for finding in findings]))
    for finding in [] if as_json else findings:
        place = f"line {finding.line}" if finding.line else "the script"
        print(f"{place}: {finding.text}\n  {finding.reason}")
    if not findings and not as_json:
        print("no trap that is known here")
    raise typer.Exit(int(bool(findings)))


@runs.command()
def drill(
    run: Run,
    steps: Annotated[int, typer.Option(min=8, help="Length of the two short runs.")] = 40,
    preempt_with: Annotated[
        str,
        typer.Option(
            metavar="OPTIONS", help='sbatch options of a job that preempts: "--partition=urgent --exclusive".'
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Prove that a run comes back on this cluster.

    The exit code is 1 when it does not.
    """
    from launcher.commands.drill import drill as run_drill

    findings = []
    try:
        options = shlex.split(preempt_with)
    except ValueError as error:
        raise UserError(f"--preempt-with {preempt_with}: {error}; valid: options as in a shell") from error
    for finding in run_drill(Path(os.path.abspath(run)), steps, Console(stderr=as_json), options):
        findings.append(finding)
        if not as_json:
            print(f"{'ok ' if finding.ok else 'NOT OK'}  {finding.text}", flush=True)
    if as_json:
        print(json.dumps([vars(finding) for finding in findings]))
    raise typer.Exit(int(not all(finding.ok for finding in findings)))


def _state(run: Path) -> RunState:
    return inspect_run(run, backend_named(read_manifest(run).backend).live_jobs(run))


def _show_action(done: dict[str, Any], as_json: bool) -> None:
    job = f"job {done['job']}: " if done["job"] else ""
    print(
        json.dumps(done)
        if as_json
        else f"{job}{done['action']}; see: alignkd status {shlex.quote(done['run'])}"
    )


class _Ended:
    """Is the run over? Slurm is asked now and then only."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._asked = 0.0

    def __call__(self) -> bool:
        if run_logs.is_over(self._run):
            return True
        if time.monotonic() - self._asked < ASK_SECONDS:
            return False
        self._asked = time.monotonic()
        return _state(self._run).state not in ("running", "queued")
