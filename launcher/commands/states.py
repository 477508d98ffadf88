"""The states of a run, as ``status`` shows them and ``--json`` prints them (docs/json.md)."""

from __future__ import annotations

from enum import StrEnum

from alignkd.errors import EXIT_FAILED, EXIT_OK, EXIT_SAVED_ON_TERM, EXIT_SAVED_ON_USR1

EXIT_NOT_ENDED = 3


class State(StrEnum):
    NOT_STARTED = "not started"
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    STOPPED = "stopped"  # saved, and resumable
    CANCELLED = "cancelled"
    FAILED = "failed"
    LOST = "lost"  # ended without recording how
    UNKNOWN = "unknown"  # the queue does not answer, and the files do not say


ONGOING = (State.QUEUED, State.RUNNING, State.UNKNOWN)
_EXIT_CODES = {
    State.DONE: EXIT_OK,
    State.FAILED: EXIT_FAILED,
    State.LOST: EXIT_FAILED,
    State.STOPPED: EXIT_SAVED_ON_USR1,
    State.CANCELLED: EXIT_SAVED_ON_TERM,
}


def exit_code_of(state: str) -> int:
    """Of ``alignkd wait`` and ``status --exit-code``: 3 for a run that has not ended, or has not begun."""
    return _EXIT_CODES.get(State(state), EXIT_NOT_ENDED)
