"""What the local and the ssh back end share: the launcher stays until the run ends, so there is no job."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from alignkd.run_folder.atomic_files import write_text_atomic
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.result import result_status
from launcher.backends.base import JobEnd, QueuedJob, Stopped
from launcher.run.lock import is_locked

if TYPE_CHECKING:
    from alignkd.config import Config
    from launcher.plan.workload import Cluster


def rank_command(run: Path, python: str = sys.executable) -> list[str]:
    return [python, "-m", "alignkd.train", str(run)]


class WatchedBackend:
    has_queue = False

    def preflight(self, config: Config, cluster: Cluster) -> tuple[list[str], list[str]]:
        return [], []

    def resume_warnings(self, run: Path, config: Config) -> list[str]:
        return []

    def check_idle(self, run: Path) -> None:
        """The run's lock is all there is to check, and whoever starts a run takes it."""

    def live_jobs(self, run: Path) -> list[QueuedJob] | None:
        """None of a run that is done, whose launcher only has to close down."""
        running = is_locked(run) and result_status(run) != "done"
        return [QueuedJob("", "RUNNING", "None", None, "")] if running else []

    def live_jobs_of(self, runs: Sequence[Path]) -> list[list[QueuedJob] | None]:
        return [self.live_jobs(run) for run in runs]

    def end_of(self, job: str) -> JobEnd | None:
        """There are no jobs."""
        return None

    def stop(self, run: Path, jobs: Sequence[QueuedJob]) -> Stopped:
        write_text_atomic(RunPaths(run).stop, "USR1\n")
        return Stopped(None, "asked its launcher to save and stop")

    def cancel(self, run: Path, jobs: Sequence[QueuedJob]) -> Stopped:
        write_text_atomic(RunPaths(run).stop, "TERM\n")
        return Stopped(None, "cancelled")

    def cancel_waiting(self, run: Path) -> Stopped | None:
        """Nothing waits without a queue."""
        return None
