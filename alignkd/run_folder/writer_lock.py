"""``writers/G.json``: one writer per run, with a heartbeat in a file of its own.

| key | holds |
|---|---|
| host, pid | the process that writes |
| job, restart | SLURM_JOB_ID and SLURM_RESTART_COUNT; null and "0" without Slurm |
| beat | changes every :data:`BEAT_SECONDS` |
| ended | true once the writer has let go |

Whoever wants to write takes the next generation G by creating its file, which only one process can do. The
run belongs to the newest generation. A process that was taken for dead beats into the file of an older one,
however late its write arrives, and so cannot win the run back. For the same reason the last file stays when
its writer ends.

Clocks are never compared, since hosts disagree about the time: a writer is alive when its beat changes while
somebody watches.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from alignkd.errors import TakenOverError, UserError
from alignkd.run_folder.atomic_files import write_text_atomic
from alignkd.run_folder.paths import RunPaths

BEAT_SECONDS = 10.0
STALE_SECONDS = 45.0  # without a new beat


class WriterLock:
    """Held by rank 0 while a run is written to, and by a launcher while it changes the run folder."""

    def __init__(
        self,
        run: Path,
        note: Callable[[str], None],
        beat_seconds: float = BEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """``note`` is told what a user should know: a stale lock taken over, this one lost."""
        self.generation = 0  # 1 or more while it is held, and afterwards
        self._run = run
        self._folder = RunPaths(run).writers
        self._note = note
        self._beat_seconds = beat_seconds
        self._stale_seconds = stale_seconds
        self._clock, self._sleep = clock, sleep
        self._beats = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="writer-lock", daemon=True)

    def __enter__(self) -> WriterLock:
        """Raises UserError when another process writes this run."""
        self._folder.mkdir(exist_ok=True)
        while self.generation == 0:
            newest = self._newest()
            if newest:
                self._wait_until_stale(newest)
            # Otherwise another one was faster. It is alive, unless it dies right now.
            with contextlib.suppress(FileExistsError):
                self._path(newest + 1).touch(exist_ok=False)
                self.generation = newest + 1
        try:
            self._write()
        except OSError:
            self._path(self.generation).unlink(missing_ok=True)
            raise
        self._remove_older()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        try:
            if self.is_held():
                self._write(ended=True)
            else:
                self._path(self.generation).unlink(missing_ok=True)
        except OSError as failure:  # the next writer has to watch whether this one is alive
            self._note(f"{self._folder}: {failure}")

    def is_held(self) -> bool:
        """False when another process has taken over the run, even if that one has ended since. What cannot be
        read says nothing: the lock counts as held."""
        try:
            # A network file system may list a folder as it was a minute ago, but notices at once that a file
            # is gone, and whoever takes over removes this one.
            return self._read(self.generation) is not None and self._newest() <= self.generation
        except OSError:
            return True

    def beat(self) -> bool:
        """One heartbeat. False when the run has another writer now."""
        if self.is_held():
            try:
                self._write()
            except OSError as error:  # a full disk must not end the run; a save will say so
                self._note(f"{self._path(self.generation)}: {error}")
        # Looked at again, because the write may have hung until after a takeover.
        if not self.is_held():
            self._note(f"{self._folder}: another process has taken over this run")
            return False
        return True

    def _newest(self) -> int:
        """The newest generation; 0 when there was none."""
        return max(self._generations(), default=0)

    def _generations(self) -> list[int]:
        names = os.listdir(self._folder)
        return [int(name.removesuffix(".json")) for name in names if name.removesuffix(".json").isdigit()]

    def _path(self, generation: int) -> Path:
        return self._folder / f"{generation}.json"

    def _wait_until_stale(self, generation: int) -> None:
        other = self._read(generation)
        if other is None or other.get("ended"):
            return
        who = f"process {other.get('pid')} on {other.get('host')}" + (
            f" (job {other['job']})" if other.get("job") else ""
        )
        if not _surely_dead(other):
            self._note(f"{self._path(generation)}: written by {who}; checking whether it is alive")
            deadline = self._clock() + self._stale_seconds
            while self._clock() < deadline:
                self._sleep(min(self._beat_seconds / 4, 1.0))
                now = self._read(generation)
                if now is None or now.get("ended"):
                    return
                if now.get("beat") != other.get("beat"):
                    raise UserError(
                        f"{self._run}: {who} is writing this run; stop it first, or wait for its end"
                    )
        self._note(f"took over the run from {who}, which is no longer running")

    def _read(self, generation: int) -> dict[str, Any] | None:
        """None for a file that is gone, {} for one that cannot be read."""
        try:
            value = json.loads(self._path(generation).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def _write(self, *, ended: bool = False) -> None:
        self._beats += 1
        facts = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": _job(),
            "restart": _restart(),
            "beat": f"{os.getpid()}.{self._beats}",
            "ended": ended,
        }
        # Not flushed: a disk that is slow to flush would make this writer look dead.
        write_text_atomic(self._path(self.generation), json.dumps(facts), durable=False)

    def _remove_older(self) -> None:
        with contextlib.suppress(OSError):
            for generation in self._generations():
                if generation < self.generation:
                    self._path(generation).unlink(missing_ok=True)

    def _keep_beating(self) -> None:
        while not self._ended.wait(self._beat_seconds) and self.beat():
            pass


def is_newest(run: Path, generation: int) -> bool:
    """:meth:`WriterLock.is_held` for a process beside the writer of this generation, which may be frozen."""
    lock = WriterLock(run, lambda _: None)
    lock.generation = generation
    return lock.is_held()


def taken_over(run: Path) -> TakenOverError:
    """What a process raises that :meth:`WriterLock.is_held` says no to."""
    return TakenOverError(f"{run}: another process has taken over this run; nothing more is written")


def _surely_dead(other: dict[str, Any]) -> bool:
    """A requeued job succeeds itself; on this host the process table knows."""
    if other.get("job") and other["job"] == _job() and other.get("restart") != _restart():
        return True
    pid = other.get("pid")
    return (
        other.get("host") == socket.gethostname()
        and isinstance(pid, int)
        and not Path(f"/proc/{pid}").exists()
    )


def _restart() -> str:
    """Slurm counts the starts of a requeued job; the variable is missing at the first."""
    return os.environ.get("SLURM_RESTART_COUNT", "0")


def _job() -> str | None:
    return os.environ.get("SLURM_JOB_ID")
