"""``alignkd status --watch``: the state of a run, again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from launcher.backends import backend_named
from launcher.commands.logs import QUEUE_SECONDS
from launcher.commands.states import ONGOING
from launcher.commands.status import RunState

if TYPE_CHECKING:
    from rich.console import Console

LOOK_SECONDS = 5.0  # without a queue; each look at one is a burden to the others


def watch_state(
    look: Callable[[], RunState],
    lines_of: Callable[[RunState], Sequence[str]],
    console: Console,
    sleep: Callable[[float], None] = time.sleep,
) -> RunState:
    """Show what ``look`` finds until the run has ended, or nothing will start it. Returns the last state.

    A terminal is redrawn in place. Elsewhere the lines are written again whenever they have changed.
    """
    from rich.live import Live
    from rich.text import Text

    with ExitStack() as stack:
        live = None
        if console.is_terminal:
            live = stack.enter_context(Live(console=console, auto_refresh=False))
        shown = ""
        while True:
            state = look()
            text = "\n".join(lines_of(state))
            if live is not None:
                live.update(Text(text, overflow="fold"), refresh=True)
            elif text != shown:
                console.print(text + "\n", markup=False, highlight=False, soft_wrap=True)
            shown = text
            if state.state not in ONGOING:
                return state
            sleep(QUEUE_SECONDS if backend_named(state.backend).has_queue else LOOK_SECONDS)
