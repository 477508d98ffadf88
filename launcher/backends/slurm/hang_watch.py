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
from launcher.run.attempts import exit_codes, slurm_step
from launcher.run.hangs import HangWatch
from launcher.run.manifest import Manifest, read_manifest

KILL_AGAIN_SECONDS = 10.0  # the controller may not have answered


def watch(run: Path, job: str) -> None:
    """Returns only when the ranks hang and have been told to end; the script ends this process otherwise."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the script survives it, not what it starts
    manifest = read_manifest(run)
    training = load_run_config(RunPaths(run).config).training
    watcher = HangWatch(
        run, manifest.world_size, rank_nodes(manifest), training.hang_seconds, training.rendezvous_seconds
    )
    script = os.getppid()
    while os.getppid() == script:
        time.sleep(watcher.interval)
        try:
            hang = watcher.look(exit_codes(run))
        except OSError:  # a stale handle (ESTALE), say: the file system may answer again
            continue
        if hang is not None:
            break
    else:
        return
    print("alignkd: the ranks hang; ending them", file=sys.stderr, flush=True)
    step = ranks_step(run, job)
    hang = record_hang(run, manifest.world_size, hang, lambda: signal_ranks(step, "USR2"))
    print(f"alignkd: hung: {hang.message}", file=sys.stderr, flush=True)
    while os.getppid() == script:  # which ends this process after `srun`
        signal_ranks(step, "KILL")
        time.sleep(KILL_AGAIN_SECONDS)


def rank_nodes(manifest: Manifest) -> list[str]:
    """The node of each rank; empty where Slurm's list cannot be read. An allocation of the user may have more
    nodes than the run."""
    names = hostnames(os.environ.get("SLURM_JOB_NODELIST", ""))[: manifest.nodes]
    known = len(names) == manifest.nodes
    return [name for name in names for _ in range(manifest.gpus_per_node)] if known else []


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
