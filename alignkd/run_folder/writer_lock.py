"""``writer.json``: one writer per run, with a heartbeat.

| key | holds |
|---|---|
| host, pid | the process that writes |
| job, restart | SLURM_JOB_ID and SLURM_RESTART_COUNT; null and "0" without Slurm |
| beat | changes every :data:`BEAT_SECONDS` |

Clocks are never compared, since hosts disagree about the time: a writer is alive when its beat changes while
somebody watches.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from alignkd.errors import UserError
from alignkd.run_folder.atomic_files import write_text_atomic
from alignkd.run_folder.paths import RunPaths

BEAT_SECONDS = 10.0
STALE_SECONDS = 45.0  # without a new beat


class WriterLock:
    """Held by rank 0 while a run is written to. ``note`` is told when a stale lock is taken over."""

    def __init__(
        self,
        run: Path,
        note: Callable[[str], None],
        beat_seconds: float = BEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
    ) -> None:
        self._path = RunPaths(run).writer
        self._note = note
        self._beat_seconds = beat_seconds
        self._stale_seconds = stale_seconds
        self._beat = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="writer-lock", daemon=True)

    def __enter__(self) -> WriterLock:
        """Raises UserError when another job writes this run."""
        other = self._read()
        if other is not None:
            self._wait_until_stale(other)
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if _is_of_this_process(self._read()):
            self._path.unlink(missing_ok=True)

    def is_held(self) -> bool:
        """False when another process has taken over the run, even if that one has ended since. A file that
        cannot be read says nothing: the lock counts as held."""
        facts = self._read()
        return facts == {} or _is_of_this_process(facts)

    def _wait_until_stale(self, other: dict[str, Any]) -> None:
        who = f"process {other.get('pid')} on {other.get('host')}" + (
            f" (job {other['job']})" if other.get("job") else ""
        )
        if not self._surely_dead(other):
            self._note(f"{self._path}: written by {who}; checking whether it is alive")
            deadline = time.monotonic() + self._stale_seconds
            while time.monotonic() < deadline:
                now = self._read()
                if now is None:
                    return
                if now.get("beat") != other.get("beat"):
                    raise UserError(
                        f"{self._path.parent}: {who} is writing this run; stop it first, or wait for its end"
                    )
                time.sleep(min(self._beat_seconds / 4, 1.0))
        self._note(f"took over the run from {who}, which is no longer running")

    def _surely_dead(self, other: dict[str, Any]) -> bool:
        """A requeued job succeeds itself; on this host the process table knows."""
        if other.get("job") and other["job"] == _job() and other.get("restart") != _restart():
            return True
        pid = other.get("pid")
        return (
            other.get("host") == socket.gethostname()
            and isinstance(pid, int)
            and not Path(f"/proc/{pid}").exists()
        )

    def _read(self) -> dict[str, Any] | None:
        try:
            value = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def _write(self) -> None:
        self._beat += 1
        facts = {
            "restart": _restart(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": _job(),
            "beat": f"{os.getpid()}.{self._beat}",
        }
        # Not flushed: a disk that is slow to flush would make this writer look dead.
        write_text_atomic(self._path, json.dumps(facts), durable=False)

    def _keep_beating(self) -> None:
        while not self._ended.wait(self._beat_seconds):
            facts = self._read()
            if facts == {}:
                continue  # unreadable just now: no reason to give up, nor to overwrite it
            if not _is_of_this_process(facts):
                self._note(f"{self._path}: another process has taken over this run")
                return
            try:
                self._write()
            except OSError as error:  # a full disk must not end the run; a save will say so
                self._note(f"{self._path}: {error}")


def _is_of_this_process(facts: dict[str, Any] | None) -> bool:
    return facts is not None and (facts.get("host"), facts.get("pid")) == (socket.gethostname(), os.getpid())


def _restart() -> str:
    """Slurm counts the starts of a requeued job; the variable is missing at the first."""
    return os.environ.get("SLURM_RESTART_COUNT", "0")


def _job() -> str | None:
    return os.environ.get("SLURM_JOB_ID")
