"""``alignkd wait``: until a run has ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from launcher.backends import backend_named
from launcher.commands.logs import RunEnded
from launcher.commands.status import RunState, current_state
from launcher.run.manifest import read_manifest

POLL_SECONDS = 2.0


def wait_for_end(run: Path, sleep: Callable[[float], None] = time.sleep) -> RunState:
    """The state of a run that has ended, or that nothing is about to start.

    Raises UserError when ``run`` is not a run folder.
    """
    has_queue = backend_named(read_manifest(run).backend).has_queue
    ended = RunEnded(run) if has_queue else RunEnded(run, seconds=0.0)
    while not ended():
        sleep(POLL_SECONDS)
    return current_state(run)
