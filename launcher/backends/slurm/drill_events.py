"""What ``alignkd drill`` does to a job: events that a long run on a cluster will meet."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignkd.errors import AlignkdError
from alignkd.run_folder.paths import RunPaths
from launcher.backends.slurm.client import hostnames
from launcher.run.attempts import Attempt
from launcher.run.exit_codes import ATTEMPT_PREFIX
from launcher.run.manifest import Manifest

LATE_SECONDS = 120.0  # until the log of a rank on another node is visible here


@dataclass(frozen=True)
class Event:
    """An interruption. ``command`` causes it, given the run folder and its open attempt."""

    name: str
    command: Callable[[Path, Attempt, Manifest], tuple[str, ...]]
    saves: bool  # do the ranks get the time to save?


# Only the children of rank.sh are killed, which is the rank itself: rank.sh survives to record the exit code.
_KILL = 'kill -KILL $(cat "/proc/$1/task/$1/children")'
_PLACE = re.compile(rf"{ATTEMPT_PREFIX}(\d+): job \S+ on (\S+), process (\d+),")


def events(preempt_with: Sequence[str]) -> tuple[Event, ...]:
    """``preempt_with`` are the sbatch options of a job that preempts; without any, a requeue stands in."""
    if preempt_with:
        first = Event("a preemption", lambda run, attempt, _: _preempting(run, attempt, preempt_with), True)
    else:
        first = Event(
            "a requeue by scontrol, in place of a preemption (no --preempt-with)",
            lambda run, attempt, _: ("scontrol", "requeue", attempt.job),
            True,
        )
    warning = Event(
        "SIGUSR1, as before a time limit",
        lambda run, attempt, _: ("scancel", "--signal=USR1", attempt.job),
        True,
    )
    return first, warning, Event("one killed rank", _killing, False)


def _preempting(run: Path, attempt: Attempt, options: Sequence[str]) -> tuple[str, ...]:
    """A job that takes the nodes of this one and ends immediately."""
    count = len(hostnames(attempt.nodes))
    own = ("--output=/dev/null", f"--nodes={count}", f"--nodelist={attempt.nodes}")
    return ("sbatch", f"--job-name={run.name}-preempts", *own, *options, "--wrap=true")


def _killing(run: Path, attempt: Attempt, manifest: Manifest) -> tuple[str, ...]:
    """Kill the last rank, on the node that its log names."""
    log = RunPaths(run).log(manifest.world_size - 1)
    end = time.monotonic() + LATE_SECONDS
    while (place := _place(log, attempt.number)) is None:
        if time.monotonic() > end:
            raise AlignkdError(f"{log}: does not tell where the rank of attempt {attempt.number} runs")
        time.sleep(1)
    node, process = place
    step = ("srun", f"--jobid={attempt.job}", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={node}")
    return (*step, "--mem=0", "--mpi=none", "--chdir=/", "bash", "-c", _KILL, "kill", process)


def _place(log: Path, attempt: int) -> tuple[str, str] | None:
    """Node and process of a rank, from the first line of its log; None while the line is not visible yet."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    places = {int(number): (node, process) for number, node, process in _PLACE.findall(text)}
    return places.get(attempt)
