"""One launcher per run, and one writer per cache, by a file lock: the kernel releases it however its holder
dies."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from alignkd.errors import UserError
from alignkd.run_folder.paths import RunPaths


def only_launcher(run: Path) -> contextlib.AbstractContextManager[None]:
    """Hold the lock of a run: while a job is submitted or, without a queue, until the run ends.

    Raises UserError when another launcher holds it. Some file systems (mounts of Lustre and NFS) have no such
    locks; there only the writer lock in the run folder keeps two starts apart.
    """
    refusal = f"{run}: another launcher runs it; wait for its end, or stop it with `alignkd stop`"
    return only_holder(RunPaths(run).launcher_lock, refusal)


@contextlib.contextmanager
def only_holder(path: Path, refusal: str) -> Iterator[None]:
    """Hold the lock of a file, which is created. Raises UserError with ``refusal`` when somebody else holds
    it; without file locks nobody does."""
    with path.open("a") as file:
        # Retried because `alignkd status` holds a shared lock for a moment when it looks.
        if not any(_take(file, wait) for wait in (0.0, 0.1, 0.3)):
            raise UserError(refusal)
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
