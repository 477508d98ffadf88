"""What the commands need of a back end, whatever starts the ranks: this process, ssh or Slurm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from alignkd.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from alignkd.config import Config
    from launcher.backends.hostfile import Host
    from launcher.plan.workload import Cluster
    from launcher.run.manifest import Manifest

BackendChoice = Literal["auto", "local", "slurm", "ssh"]


@dataclass(frozen=True)
class QueuedJob:
    """A job that trains a run, or will. ``start`` is when it started, or Slurm's estimate, or None.

    ``id`` is empty for a run whose launcher watches the ranks itself. ``script`` is empty for a job that is
    not the run's own: an allocation of the user's, which outlives the run.
    """

    id: str
    state: str
    reason: str
    start: str | None
    script: str


class JobEnd(NamedTuple):
    """How a job ended, in the cluster's words; ``comment`` is what the job itself left there."""

    state: str
    comment: str | None


class Started(NamedTuple):
    """``code`` is the run's exit code where the back end waited for its end; ``job``: one was submitted."""

    code: int
    job: str | None


class Stopped(NamedTuple):
    """What was done to stop a run, in words, and the job that it was done to."""

    job: str | None
    action: str


class Backend(Protocol):
    """Holds no state of its own: whatever it must remember lies in the run folder."""

    has_queue: bool  # a run is a job that outlives the command which started it, and may have to wait

    def hosts(self, hostfile: Path | None, nodes: int | None, gpus_per_node: int | None) -> tuple[Host, ...]:
        """The hosts to run on; empty where they are not the user's to choose.

        Raises UserError for a hostfile that is missing, too short, or of no use.
        """

    def preflight(self, config: Config, cluster: Cluster) -> tuple[list[str], list[str]]:
        """Everything that would keep a new run from starting, and what is only worth a warning."""

    def resume_warnings(self, run: Path, config: Config) -> list[str]:
        """What may keep the run from resuming because it has changed since the launch."""

    def prepare(self, run: Path, hosts: Sequence[Host]) -> None:
        """Add to a new or resized run folder what only this back end reads."""

    def resize_problems(
        self, run: Path, wanted: Manifest, config: Config, hosts: Sequence[Host]
    ) -> list[str]:
        """Why the run cannot continue at the size of ``wanted``; ``hosts`` are new ones, if any."""

    def would_run(self, run: Path, manifest: Manifest) -> str:
        """What a start would do, for a dry run."""

    def start(self, run: Path, manifest: Manifest, console: Console, after: str | None = None) -> Started:
        """Start or resume the run. The caller holds the run's lock.

        Where the user chose no queue, this returns when all ranks have ended. Job ``after`` must end well
        before a submitted job starts.
        """

    def check_idle(self, run: Path) -> None:
        """Raises UserError when a job trains the run already, or will."""

    def live_jobs(self, run: Path) -> list[QueuedJob] | None:
        """Jobs that train the run, or will; None when the cluster does not answer."""

    def live_jobs_of(self, runs: Sequence[Path]) -> list[list[QueuedJob] | None]:
        """``live_jobs`` of each run, with one question to the cluster."""

    def end_of(self, job: str) -> JobEnd | None:
        """How a job that is in no queue ended; None when the cluster has forgotten it or does not answer."""

    def stop(self, run: Path, jobs: Sequence[QueuedJob]) -> Stopped:
        """Ask for a save and an end that is not followed by a restart. ``jobs`` are the live ones."""

    def cancel(self, run: Path, jobs: Sequence[QueuedJob]) -> Stopped:
        """End the run now; ranks save if they are given the time."""

    def cancel_waiting(self, run: Path) -> Stopped | None:
        """Cancel what waits for a run without live jobs, and would for ever. None: nothing does."""


def refuse_hostfile(hostfile: Path | None) -> None:
    """For back ends that find their nodes without the user."""
    if hostfile is not None:
        raise UserError("--hostfile is only for the ssh back end (--backend ssh)")
