"""What the Python parts of ``job.sbatch`` share: its log, its pauses, and what `alignkd stop` asked for."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from alignkd.run_folder.atomic_files import read_json
from alignkd.run_folder.paths import RunPaths
from launcher.backends.slurm.client import hostnames

POLL_SECONDS = 15.0  # between two questions to Slurm; less than any KillWait (30 s by default)


def say(text: str) -> None:
    """Into the log of the job."""
    print(f"alignkd: {text}", file=sys.stderr, flush=True)


def hold_sigterm() -> None:
    """From here on SIGTERM ends neither this process nor the commands that it starts: it ends a ``pause``.

    Slurm sends it when it has decided about the job, and SIGKILL after KillWait (30 s by default).
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def pause(seconds: float) -> None:
    """Returns early when SIGTERM has come."""
    signal.sigtimedwait({signal.SIGTERM}, seconds)


def in_users_allocation() -> bool:
    """Does `alignkd launch` run the script inside an allocation, which is not the run's own?"""
    return "ALIGNKD_RUN" in os.environ


def asked(run: Path) -> list[str] | None:
    """What `alignkd stop` or `cancel` wrote: USR1 or TERM, then the jobs it is meant for; None: nothing."""
    try:
        return RunPaths(run).stop.read_text(encoding="utf-8").split()
    except OSError:
        return None


def rank_count(run: Path) -> int:
    """From the manifest: Slurm does not always set SLURM_NTASKS."""
    return int((read_json(RunPaths(run).manifest) or {}).get("world_size", 0))


def node_count(run: Path) -> int:
    """From the manifest: an allocation of the user's may have more nodes than the run."""
    return int((read_json(RunPaths(run).manifest) or {}).get("nodes", 1))


def nodes_of_ranks(run: Path) -> str:
    """Slurm's list of the nodes of the ranks: the first ones of an allocation that is larger, as `srun` does.

    The job's whole list where Slurm does not answer.
    """
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    if not larger_than(node_count(run)):
        return nodes
    return ",".join(hostnames(nodes)[: node_count(run)]) or nodes


def larger_than(count: int) -> bool:
    """Has the job more nodes?"""
    return int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) > count
