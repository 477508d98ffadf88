"""How run states look on a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from alignkd.config.combinations import counted
from launcher.backends import backend_named
from launcher.commands.status import RunState
from launcher.run.progress import NOTABLE_WAIT, duration

_NOTABLE_PADDING = 0.1


def show_state(state: RunState, console: Console) -> None:
    """Nothing is cut or broken at the terminal's edge: folders and commands are there to be copied."""
    shown = _fields(state)
    width = max(len(name) for name, _ in shown)
    for name, value in shown:
        console.print(f"{name:<{width}}  {value}", markup=False, highlight=False, soft_wrap=True)


def _fields(state: RunState) -> list[tuple[str, str]]:
    queue = backend_named(state.backend).has_queue
    shown = [
        ("run", state.run),
        ("state", f"{state.state}: {state.detail}" if state.detail else state.state),
        ("step", _steps(state)),
    ]
    if state.start_estimate:
        shown.append(("start", f"{state.start_estimate} (Slurm's estimate)"))
    if state.seconds_left is not None:
        shown.append(("left", duration(state.seconds_left)))
    if state.loss is not None:
        shown.append(("loss", f"{state.loss:.4g}"))
    if state.data_wait_share is not None and state.data_wait_share > NOTABLE_WAIT:
        shown.append(("waiting", f"for data {state.data_wait_share:.0%} of a step: more data.workers"))
    if state.padding_share is not None and state.padding_share > _NOTABLE_PADDING:
        shown.append(("padding", f"{state.padding_share:.0%} of the positions: see training.packing"))
    if queue:
        shown.append(("job", state.job or "none"))
    if state.attempts or queue:
        queued = f", {duration(state.queue_seconds)} in the queue" if queue else ""
        ended = f" ({', '.join(state.reasons)})" if state.reasons else ""
        lost = counted(state.lost_steps, "step")
        shown.append(("attempts", f"{state.attempts}{ended}, {lost} lost{queued}"))
    if state.goodput is not None:
        shown.append(("goodput", f"{state.goodput:.0%} of the time went into steps that were kept"))
    return [*shown, ("next", state.next)]


def state_table(states: list[RunState]) -> Table:
    """Of runs in one folder, by their names: whole paths would be cut until they look the same."""
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for column in ("state", "step", "left", "loss", "attempts", "goodput"):
        table.add_column(column, justify="left" if column == "state" else "right", no_wrap=True)
    for state in states:
        left = "" if state.seconds_left is None else duration(state.seconds_left)
        loss = "" if state.loss is None else f"{state.loss:.4g}"
        goodput = "" if state.goodput is None else f"{state.goodput:.0%}"
        attempts = str(state.attempts)
        table.add_row(Path(state.run).name, state.state, _steps(state), left, loss, attempts, goodput)
    return table


def _steps(state: RunState) -> str:
    return f"{state.step} of {state.total_steps}" if state.total_steps else str(state.step)
