"""The process that rank 0 starts for the trackers of its run."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from alignkd.config.live_sections import TrackingSection
from alignkd.tracking.packages import trackers_of

log = logging.getLogger(__name__)
WAIT_SECONDS = 40.0  # longer than the process gives its trackers


@contextlib.contextmanager
def tracked(run: Path, tracking: TrackingSection, resumed_step: int) -> Iterator[None]:
    """Inside, the trackers follow the run, which has resumed from ``resumed_step``. At the end they get a
    little time for the last rows; after an error they take it while this process ends."""
    process = _start(run, resumed_step) if trackers_of(tracking) else None
    yield
    if process is None:
        return
    try:
        process.communicate(timeout=WAIT_SECONDS)  # closes its stdin
    except subprocess.TimeoutExpired:
        process.kill()
        log.warning("warning: the trackers did not end within %.0f s; rows may be missing", WAIT_SECONDS)


def _start(run: Path, resumed_step: int) -> subprocess.Popen[bytes] | None:
    command = [sys.executable, "-m", "alignkd.tracking", str(run), "--resumed", str(resumed_step)]
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE)
    except OSError as error:
        log.warning("warning: no tracking in this attempt: %s", error)
        return None
