"""A short step on every node of a job: does it respond, and does it see what the ranks read and write?"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launcher.backends.node_probe import LATE_SECONDS, SCRIPT, Place, arguments, run_place, tokens, unseen
from launcher.backends.slurm.script import larger_than

_ANSWER_SECONDS = 120  # srun gives up on a lost node after time-outs of its own


def nodes_that_see(run: Path, count: int, nodes: str) -> dict[str, bool]:
    """Node names, and whether the node sees a file that has just been written into the run folder.

    Nodes that do not respond are missing: all of them when no step can be started. For the batch script: the
    ``count`` ``nodes`` (``n[1-2]``) are those of its own job, or some of them.
    """
    return {node: not places for node, places in ask_nodes([run_place(run)], count, nodes).items()}


def ask_nodes(places: Sequence[Place], count: int, nodes: str) -> dict[str, list[Place]]:
    """What each node of the job that responds does not see. See ``nodes_that_see``."""
    with tokens(places) as token:
        # The name is known on the node only.
        script = f'set -- "$SLURMD_NODENAME" "$@"\n{SCRIPT}'
        only = [f"--nodelist={nodes}"] if larger_than(count) else []
        command = [
            *("srun", *only, "--overlap", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1"),
            *("--mem=0", "--mpi=none", "--export=ALL", "--chdir=/", "bash", "-c", script, "probe"),
            *arguments(token, places),
        ]
        # The job's options for its ranks must not become options of this step.
        of_ranks = ("SLURM_CPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_NTASKS_PER_NODE")
        environment = {key: value for key, value in os.environ.items() if key not in of_ranks}
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                text=True, timeout=2 * LATE_SECONDS + _ANSWER_SECONDS, env=environment,
            )  # fmt: skip
            output = done.stdout
        except subprocess.TimeoutExpired as error:
            output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        except OSError:
            output = ""
    return unseen(output, places)
