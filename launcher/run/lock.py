"""One launcher per run, by a file lock: the kernel releases it however its holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from alignkd.errors import UserError
from alignkd.run_folder.paths import RunPaths


@contextlib.contextmanager
def only_launcher(run: Path) -> Iterator[None]:
    """Hold the lock of a run: while a job is submitted or, without a queue, until the run ends.

    Raises UserError when another launcher holds it. Some file systems (mounts of Lustre and NFS) have no such
    locks; there only the writer lock in the run folder keeps two starts apart.
    """
    with RunPaths(run).launcher_lock.open("a") as file:
        # Retried because `alignkd status` holds a shared lock for a moment when it looks.
        if not any(_take(file, wait) for wait in (0.0, 0.1, 0.3)):
            raise UserError(
                f"{run}: another launcher runs it; wait for its end, or stop it with `alignkd stop`"
            )
        yield


def _take(file: IO[str], wait_seconds: float) -> bool:
    """Try once, after waiting. True also where the file system has no locks."""
    time.sleep(wait_seconds)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def is_locked(run: Path) -> bool:
    """Whether a launcher holds the lock of the run."""
    try:
        with RunPaths(run).launcher_lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
