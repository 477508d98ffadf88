"""One launcher per run: a lock that the kernel releases when its holder dies, however it dies."""

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
    """Held while a run is prepared and submitted, or, without a job in a queue, until it ends.

    Raises UserError when another launcher has it. A file system without such locks (some mounts of Lustre and
    NFS) grants none; the writer's lock in the run folder is then all that keeps two starts apart.
    """
    with RunPaths(run).launcher_lock.open("a") as file:
        # `status` looks by holding a shared lock for a moment: that is no launcher.
        if not any(_take(file, wait) for wait in (0.0, 0.1, 0.3)):
            raise UserError(
                f"{run}: another launcher runs it; wait for it, or stop it (`alignkd stop`, or Ctrl-C there)"
            )
        yield


def _take(file: IO[str], wait_seconds: float) -> bool:
    """Also True where there are no such locks."""
    time.sleep(wait_seconds)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def is_locked(run: Path) -> bool:
    """Does a launcher hold the run?"""
    try:
        with RunPaths(run).launcher_lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
