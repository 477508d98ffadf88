"""The process that rank 0 starts for the trackers of its run."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from alignkd.config.live_sections import TrackingSection
from alignkd.errors import EXIT_OK
from alignkd.tracking.packages import trackers_of

log = logging.getLogger(__name__)
WAIT_SECONDS = 40.0  # longer than the process gives its trackers
STOP_SECONDS = 5.0  # after a stop, when time is short; the next attempt writes what is missing
# They are meant for the rank, but Slurm and a terminal send them to its whole group.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def train_tracked(
    train: Callable[[], int], run: Path, tracking: TrackingSection, resumed_step: int, generation: int
) -> int:
    """``train()``, whose exit code is returned, while the trackers follow the run, which has resumed from
    ``resumed_step``, as long as it has the writer of this generation. After it they get a little time for the
    last rows; after an error they get what this process takes to end."""
    if not trackers_of(tracking):
        return train()
    process = _start(run, resumed_step, generation)
    code = train()
    if process is not None:
        _end(process, WAIT_SECONDS if code == EXIT_OK else STOP_SECONDS)
    return code


def _start(run: Path, resumed_step: int, generation: int) -> subprocess.Popen[bytes] | None:
    command = [sys.executable, "-m", "alignkd.tracking", str(run), "--resumed", str(resumed_step)]
    command += ["--generation", str(generation)]
    # The process inherits the mask, and unblocks them once it ignores them: its imports take a while.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE)
    except OSError as error:
        log.warning("warning: no tracking in this attempt: %s", error)
        return None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.communicate(timeout=seconds)  # closes its stdin
    except subprocess.TimeoutExpired:
        process.kill()
        log.warning("warning: the trackers did not end within %.0f s; rows may be missing", seconds)
        return
    if process.returncode != 0:
        log.warning(
            "warning: the trackers' process has ended with code %d; rows may be missing", process.returncode
        )
