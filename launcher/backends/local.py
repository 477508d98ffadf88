"""The local back end: all ranks of a run, of all its nodes, as processes of this machine."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from alignkd.errors import UserError
from alignkd.run_folder.paths import RunPaths
from alignkd.text import counted
from launcher.backends.base import Started, refuse_hostfile
from launcher.backends.devices import device_of, visible_gpus
from launcher.backends.hostfile import Host
from launcher.backends.ranks import RankGroup, free_port, rank_environments, start_ranks
from launcher.backends.run_environment import run_environment
from launcher.backends.watch import watch_ranks
from launcher.backends.watched import WatchedBackend, rank_command
from launcher.run import attempts
from launcher.run.exit_codes import ATTEMPT_PREFIX
from launcher.run.manifest import Manifest

if TYPE_CHECKING:
    from rich.console import Console

    from alignkd.config import Config
    from launcher.plan.workload import Cluster


class LocalBackend(WatchedBackend):
    def hosts(self, hostfile: Path | None, nodes: int | None, gpus_per_node: int | None) -> tuple[Host, ...]:
        refuse_hostfile(hostfile)
        return ()

    def preflight(self, config: Config, cluster: Cluster) -> tuple[list[str], list[str]]:
        gpus = visible_gpus(os.environ)
        if device_of(config) == "cpu" or len(gpus) >= cluster.ranks:
            return [], []
        return [_missing_gpus(cluster, len(gpus))], []

    def prepare(self, run: Path, hosts: Sequence[Host]) -> None:
        """The ranks get everything from this process."""

    def resize_problems(
        self, run: Path, wanted: Manifest, config: Config, hosts: Sequence[Host]
    ) -> list[str]:
        problem = gpu_problem(run, wanted, visible_gpus(os.environ))
        return [] if problem is None else [problem]

    def would_run(self, run: Path, manifest: Manifest) -> str:
        times, env = counted(manifest.world_size, "time"), shlex.quote(str(RunPaths(run).environment_script))
        return f'would run {times}: source {env}; "$PYTHON" {shlex.join(rank_command(run)[1:])}'

    def start(self, run: Path, manifest: Manifest, console: Console, after: str | None = None) -> Started:
        return Started(run_local(run, manifest, console), None)


def _missing_gpus(cluster: Cluster, found: int) -> str:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = "" if hidden is None else f" (CUDA_VISIBLE_DEVICES={hidden!r})"
    wanted = f"--nodes {cluster.nodes} --gpus-per-node {cluster.gpus_per_node}"
    return (
        f"{wanted} needs {counted(cluster.ranks, 'GPU')}, "
        f"and this machine has {found}{why}; valid: fewer ranks, --cpu to train on CPUs, or another --backend"
    )


def gpu_problem(run: Path, manifest: Manifest, gpus: Sequence[str]) -> str | None:
    """Why the run cannot use these GPUs; None when it can, or when it runs on the CPU."""
    if manifest.device == "cpu" or len(gpus) >= manifest.world_size:
        return None
    return (
        f"{run} takes {manifest.world_size} GPUs and this machine has {len(gpus)}; resume it on a machine "
        "that has them, or with fewer --nodes"
    )


def run_local(run: Path, manifest: Manifest, console: Console, command: Sequence[str] | None = None) -> int:
    """Start the ranks of ``run``, show their progress until all have ended, and return the exit code.

    ``command`` starts one rank (default: ``alignkd.train``). The ranks get the environment of env.sh.
    """
    environment = run_environment(run)
    gpus = visible_gpus(environment)
    problem = gpu_problem(run, manifest, gpus)
    if problem:
        raise UserError(problem)

    def start() -> RankGroup:
        environments = rank_environments(
            manifest.nodes, manifest.gpus_per_node, free_port(), manifest.device, gpus, environment
        )
        attempt = attempts.begin(run, "local", platform.node(), None)
        words = command or rank_command(run, environment["PYTHON"])
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        shown = shlex.join(words).replace("\n", " ")
        heading = f"{ATTEMPT_PREFIX}{attempt.number}: {now}, on {platform.node()}: {shown}"
        return start_ranks(words, environments, RunPaths(run).logs, heading)

    return watch_ranks(run, start, console)
