"""`alignkd status --watch`: redrawn on a terminal, elsewhere written on a change, over when the run is."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from launcher.cli.app import app
from launcher.commands import status, watch
from launcher.commands.logs import QUEUE_SECONDS
from launcher.commands.states import State
from launcher.commands.status import RunState, current_state
from launcher.commands.watch import LOOK_SECONDS, watch_state

CURSOR_UP = "\x1b[1A"


@pytest.fixture
def states(make_run) -> list[RunState]:
    """Two looks at the same step, one at a later step, and one at the end."""
    state = replace(current_state(make_run()[0]), state=State.RUNNING, step=1)
    return [state, state, replace(state, step=2), replace(state, state=State.DONE, step=3)]


def watched(states: list[RunState], *, terminal: bool) -> tuple[str, list[float], RunState]:
    looks, waits, file = iter(states), list[float](), io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=80, color_system=None)
    last = watch_state(
        lambda: next(looks), lambda one: [one.state, f"step {one.step}"], console, waits.append
    )
    return file.getvalue(), waits, last


def test_it_looks_until_the_run_has_ended(states: list[RunState]) -> None:
    text, waits, last = watched(states, terminal=False)
    assert text == "running\nstep 1\n\nrunning\nstep 2\n\ndone\nstep 3\n\n"
    assert waits == [LOOK_SECONDS] * 3
    assert last is states[-1]


def test_slurm_is_asked_less_often(states: list[RunState]) -> None:
    _, waits, _ = watched([replace(state, backend="slurm") for state in states], terminal=False)
    assert waits == [QUEUE_SECONDS] * 3
    assert QUEUE_SECONDS >= 30


@pytest.mark.parametrize(
    "state", [State.NOT_STARTED, State.STOPPED, State.FAILED, State.CANCELLED, State.LOST]
)
def test_a_run_that_nothing_will_change_is_shown_once(states: list[RunState], state: State) -> None:
    text, waits, _ = watched([replace(states[0], state=state)], terminal=False)
    assert (text, waits) == (f"{state}\nstep 1\n\n", [])


def test_a_terminal_is_redrawn_in_place_and_left_as_it_was(states: list[RunState]) -> None:
    text, _, _ = watched(states, terminal=True)
    assert text.count(CURSOR_UP) == len(states)  # from the second look on, and once at the end
    assert text.index("step 1") < text.index("step 2") < text.index("step 3")
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is hidden, and shown again


def test_the_command_ends_with_the_run(make_run) -> None:
    run: Path = make_run()[0]
    runner = CliRunner()
    once = runner.invoke(app, ["status", str(run)])
    done = runner.invoke(app, ["status", str(run), "--watch", "--exit-code"])
    assert (done.exit_code, done.stdout) == (3, once.stdout + "\n")
    assert runner.invoke(app, ["status", str(run.parent), "--watch"]).exit_code == 2
    assert runner.invoke(app, ["status", str(run), "--watch", "--json"]).exit_code == 2


def test_ctrl_c_ends_it_without_a_traceback(states: list[RunState], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(status, "current_state", lambda _: states[0])
    monkeypatch.setattr(watch, "watch_state", interrupt)
    done = CliRunner().invoke(app, ["status", states[0].run, "--watch"])
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "")
