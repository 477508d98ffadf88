"""What commands print for people: tables, and the state of one run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkd.text import counted, duration
from launcher.backends import backend_named
from launcher.commands.status import RunState
from launcher.run.progress_view import NOTABLE_WAIT

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from launcher.run.checkpoints import CheckpointSummary

_NOTABLE_PADDING = 0.1


def show_state(state: RunState) -> None:
    """Lines are not wrapped or cut at the terminal's edge: folders and commands are there to be copied."""
    print("\n".join(state_lines(state)))


def state_lines(state: RunState) -> list[str]:
    shown = _fields(state)
    width = max(len(name) for name, _ in shown)
    return [f"{name:<{width}}  {value}" for name, value in shown]


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
    if state.weights is not None:
        weights = (f"{name} {weight:.3g}" for name, weight in state.weights.items())
        shown.append(("weights", ", ".join(weights)))
    if state.best is not None:
        shown.append(("best", str(state.best)))
    if state.accuracy is not None:
        shown.append(("accuracy", f"{state.accuracy:.4g} after step {state.accuracy_step}"))
    if state.data_wait_share is not None and state.data_wait_share > NOTABLE_WAIT:
        shown.append(("waiting", f"{state.data_wait_share:.0%} of a step for data; increase data.workers"))
    if state.padding_share is not None and state.padding_share > _NOTABLE_PADDING:
        shown.append(("padding", f"{state.padding_share:.0%} of the positions; see training.packing"))
    if state.slow_ranks:
        names = ", ".join(state.slow_ranks[:4]) + (" ..." if len(state.slow_ranks) > 4 else "")
        shown.append(("slow", f"{names} the median rank's time for samples and forwards"))
    if queue:
        shown.append(("job", state.job or "none"))
    if state.attempts or queue:
        queued = f", {duration(state.queue_seconds)} in the queue" if queue else ""
        ended = f" ({', '.join(state.reasons)})" if state.reasons else ""
        lost = counted(state.lost_steps, "step")
        shown.append(("attempts", f"{state.attempts}{ended}, {lost} lost{queued}"))
    if state.goodput is not None:
        shown.append(("goodput", f"{state.goodput:.0%} of the time was spent on steps that were kept"))
    return [*shown, ("next", state.next)]


_COLUMNS = ("state", "step", "left", "loss", "attempts", "goodput")


def state_table(states: list[RunState], console: Console) -> Table:
    """Runs of one folder are shown by name: whole paths would be cut until they look the same.

    On a narrow console the last columns are left out: names are not.
    """
    unlimited = console.options.update(max_width=1000)
    for count in range(len(_COLUMNS), 1, -1):
        table = _state_columns(states, count)
        if console.measure(table, options=unlimited).maximum <= console.width:
            return table
    return _state_columns(states, 1)


def _state_columns(states: list[RunState], count: int) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for column in _COLUMNS[:count]:
        table.add_column(column, justify="left" if column == "state" else "right", no_wrap=True)
    for state in states:
        left = "" if state.seconds_left is None else duration(state.seconds_left)
        loss = "" if state.loss is None else f"{state.loss:.4g}"
        goodput = "" if state.goodput is None else f"{state.goodput:.0%}"
        cells = (state.state, _steps(state), left, loss, str(state.attempts), goodput)
        table.add_row(Path(state.run).name, *cells[:count])
    return table


def _steps(state: RunState) -> str:
    return f"{state.step} of {state.total_steps}" if state.total_steps else str(state.step)


def checkpoint_table(rows: list[CheckpointSummary]) -> Table:
    table = _framed(["checkpoint", "state"], ["ranks", "ZeRO stage", "MB"])
    for row in rows:
        state = row.state if not row.problems else f"{row.state}: {row.problems[0]}"
        sizes = ("?" if value is None else str(value) for value in (row.world_size, row.zero_stage))
        table.add_row(row.name, state, *sizes, f"{row.bytes / 1e6:.1f}")
    return table


def probe_table(result: dict[str, Any]) -> Table:
    """``result`` is what ``alignkd probe --json`` prints."""
    table = _framed(["term"], ["value", "count", "weight", "gradient norm"])
    for term, value in result["terms"].items():
        count, numbers = result["counts"].get(term, ""), (result["weights"], result["gradient_norms"])
        weight, norm = (f"{found[term]:.6g}" if term in found else "" for found in numbers)
        table.add_row(term, f"{value:.6g}", str(count), weight, norm)
    return table


def probe_parts_table(result: dict[str, Any]) -> Table:
    """Where in the student the gradient of each weighted term goes."""
    terms = list(result["parts"])
    table = _framed(["gradient norm, weighted"], terms)
    for part in result["parts"][terms[0]]:
        table.add_row(part, *(f"{result['parts'][term][part]:.3g}" for term in terms))
    return table


def _framed(texts: list[str], numbers: list[str]) -> Table:
    from rich.table import Table

    table = Table()
    for index, name in enumerate(texts):
        table.add_column(name, overflow="fold", no_wrap=index == 0)  # the name stays on a narrow terminal
    for name in numbers:
        table.add_column(name, justify="right")
    return table
