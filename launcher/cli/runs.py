"""Commands on existing runs: status, list, logs, stop, cancel, resume."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alignkd.errors import UserError
from launcher.cli.framework import Commands
from launcher.cli.options import Json, Run, make_console

if TYPE_CHECKING:
    from launcher.commands.status import RunState

runs = Commands()


@runs.command()
def status(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="Run folder, or a folder of runs.", show_default="./runs"),
    ] = None,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with the code of the state, as `wait` does.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Keep showing a run's state until it has ended.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the state of a run, or of all runs in a folder."""
    from launcher.commands.states import exit_code_of
    from launcher.commands.status import current_state, holds_runs

    if run is None or holds_runs(run):
        if exit_code or watch:
            raise UserError(f"{'--exit-code' if exit_code else '--watch'} needs one RUN")
        _list_runs(run, as_json)
        return
    if watch:
        state = _watch(Path(os.path.abspath(run)), as_json)
    else:
        state = current_state(Path(os.path.abspath(run)))
        _show_state(state, as_json)
    if exit_code:
        raise typer.Exit(exit_code_of(state.state))


def _watch(run: Path, as_json: bool) -> RunState:
    if as_json:
        raise UserError("--watch and --json: give only one of them; `alignkd wait --json` waits for the end")
    from launcher.cli.tables import state_lines
    from launcher.commands.status import current_state
    from launcher.commands.watch import watch_state

    try:
        return watch_state(lambda: current_state(run), state_lines, make_console())
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@runs.command()
def wait(run: Run, as_json: Json = False) -> None:
    """Wait until a run has ended, then show its state.

    The exit code is 0 if it is done, 1 if it failed or was lost, 85 if it was stopped, 86 if it was
    cancelled, and 3 if it was never started.
    """
    from launcher.commands.states import exit_code_of
    from launcher.commands.wait import wait_for_end

    state = wait_for_end(Path(os.path.abspath(run)))
    _show_state(state, as_json)
    raise typer.Exit(exit_code_of(state.state))


def _show_state(state: RunState, as_json: bool) -> None:
    if as_json:
        print(json.dumps(state.as_dict()))
        return
    from launcher.cli.tables import show_state

    show_state(state)


@runs.command("list")
def list_runs(
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="Parent of run folders.", show_default="./runs")
    ] = None,
    as_json: Json = False,
) -> None:
    """List all runs in a folder."""
    _list_runs(folder, as_json)


def _list_runs(given: Path | None, as_json: bool) -> None:
    """None: ./runs, which there need not be yet."""
    from launcher.commands.status import all_states

    folder = Path(os.path.abspath(given or "runs"))
    states, problems = all_states(folder) if given or folder.is_dir() else ([], [])
    for problem in problems:
        print(f"skipped: {problem}", file=sys.stderr)
    if as_json:
        print(json.dumps([state.as_dict() for state in states]))
    elif states:
        from launcher.cli.tables import state_table

        console = make_console()
        console.print(state_table(states, console))
    else:
        print(f"no runs yet in {folder}; start one with: alignkd launch")


@runs.command()
def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep reading until the run ends.")] = False,
    rank: Annotated[int, typer.Option(metavar="N", min=0, help="Rank whose log to show.")] = 0,
    attempt: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Attempt to show.", show_default="the last")
    ] = None,
    errors: Annotated[
        bool, typer.Option("--errors", help="Show the first error: of a rank, else of the job.")
    ] = False,
    job: Annotated[
        bool, typer.Option("--job", help="Show what the Slurm job said: its script, srun, OOM kills.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the log of a rank, or of the Slurm job."""
    from launcher.commands.logs import follow_run
    from launcher.run.logs import attempt_lines, job_log_lines
    from launcher.run.manifest import read_manifest

    read_manifest(run)
    if follow and (as_json or errors or job or attempt is not None):
        raise UserError("--follow works with --rank only")
    if errors and job:
        raise UserError("--errors and --job: give only one of them")
    if errors:
        _show_first_error(run, attempt, as_json)
    elif job:
        number, lines = job_log_lines(run, attempt)
        print(json.dumps({"job": number, "lines": lines}) if as_json else "\n".join(lines))
    elif follow:
        for text in follow_run(Path(os.path.abspath(run)), rank):
            print(text, end="", flush=True)
    else:
        lines = attempt_lines(run, rank, attempt)
        print(json.dumps({"rank": rank, "lines": lines}) if as_json else "\n".join(lines))


def _show_first_error(run: Path, attempt: int | None, as_json: bool) -> None:
    from launcher.run.logs import first_error

    error = first_error(run, attempt)
    if as_json:
        print(json.dumps(None if error is None else vars(error)))
    elif error is None:
        print("no attempt has failed" if attempt is None else f"attempt {attempt} has not failed")
    else:
        if error.attempt is None:
            print(f"job {error.job} ended before an attempt began; the end of {error.log}:")
        elif error.rank is None:
            print(f"attempt {error.attempt}: no rank recorded an exit; the end of {error.log}:")
        else:
            print(
                f"attempt {error.attempt}: rank {error.rank} failed first, with exit code {error.exit_code}"
            )
        print("\n".join(f"  | {line}" for line in error.lines))
        if error.cause is not None:
            print(f"cause: {error.cause}")


@runs.command()
def stop(run: Run, as_json: Json = False) -> None:
    """Ask a run to save and stop, without a requeue."""
    from launcher.commands.control import stop_run

    _show_action(stop_run(run), as_json)


@runs.command()
def cancel(run: Run, as_json: Json = False) -> None:
    """Cancel a run; it saves only if the cluster allows the time."""
    from launcher.commands.control import cancel_run

    _show_action(cancel_run(run), as_json)


def _show_action(done: dict[str, Any], as_json: bool) -> None:
    job = f"job {done['job']}: " if done["job"] else ""
    shown = f"{job}{done['action']}; see: alignkd status {shlex.quote(done['run'])}"
    print(json.dumps(done) if as_json else shown)


@runs.command()
def resume(
    run: Run,
    nodes: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Number of nodes.", show_default="as before")
    ] = None,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Ranks per node, one per GPU.", show_default="as before"),
    ] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="New hosts of an ssh run, one `host slots=N` per line."),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Roll back to the checkpoint of this step; newer ones are set aside."
        ),
    ] = None,
    from_scratch: Annotated[
        bool,
        typer.Option("--from-scratch", help="Train from step 0; checkpoints and metrics are set aside."),
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Accept that KEY differs from the checkpoint; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Resume a run, optionally on a different number of nodes.

    It continues from the newest checkpoint, from that of --step, or from nothing with --from-scratch.
    """
    from launcher.commands.resume import ResumeRequest, resume_run

    request = ResumeRequest(nodes, gpus_per_node, hostfile, step, tuple(allow_change or ()), from_scratch)
    result = resume_run(run, request, make_console(stderr=as_json))
    if as_json:
        print(json.dumps(result))
    elif result["job"]:
        print(f"submitted job {result['job']}; next: alignkd status {shlex.quote(str(run))}")
    raise typer.Exit(result["code"])
