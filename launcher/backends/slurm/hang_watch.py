"""``python -m launcher.backends.slurm.hang_watch RUN``: runs beside the ranks of a job, on its first node.

``job.sbatch`` starts it before `srun` and ends it afterwards. When the ranks hang it asks for their stacks,
records who is behind, and kills their step; ``batch`` then finds the record.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from alignkd.config import load_run_config
from alignkd.run_folder.paths import RunPaths
from launcher.backends.hang_end import record_hang
from launcher.backends.slurm.client import hostnames, run_slurm_command, signal_ranks
from launcher.backends.slurm.script import nodes_of_ranks
from launcher.run.attempts import exit_codes, slurm_step
from launcher.run.hangs import HangWatch
from launcher.run.manifest import read_manifest

KILL_AGAIN_SECONDS = 10.0  # the controller may not have answered


def watch(run: Path, job: str) -> None:
    """Returns only when the ranks hang and have been told to end; the script ends this process otherwise."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the script survives it, not what it starts
    world_size = read_manifest(run).world_size
    hang_seconds = load_run_config(RunPaths(run).config).training.hang_seconds
    nodes = hostnames(nodes_of_ranks(run))
    watcher = HangWatch(run, world_size, nodes, hang_seconds)
    script = os.getppid()
    while os.getppid() == script:
        time.sleep(watcher.interval)
        hang = watcher.look(exit_codes(run))
        if hang is not None:
            break
    else:
        return
    print("alignkd: the ranks hang; ending them", file=sys.stderr, flush=True)
    step = ranks_step(run, job)
    hang = record_hang(run, world_size, hang, lambda: signal_ranks(step, "USR2"))
    print(f"alignkd: hung: {hang.message}", file=sys.stderr, flush=True)
    while os.getppid() == script:  # which ends this process after `srun`
        signal_ranks(step, "KILL")
        time.sleep(KILL_AGAIN_SECONDS)


def ranks_step(run: Path, job: str) -> str:
    """``JOB.STEP``; asked of Slurm where rank 0 has not come to write it down."""
    known = slurm_step(run)
    if known is not None:
        return known
    listed = run_slurm_command("squeue", "--noheader", "--steps", f"--jobs={job}", "--format=%i") or ""
    numbered = [step for step in listed.split() if step.partition(".")[2].isdigit()]
    return numbered[-1] if numbered else f"{job}.0"


if __name__ == "__main__":
    watch(Path(sys.argv[1]), os.environ["SLURM_JOB_ID"])
