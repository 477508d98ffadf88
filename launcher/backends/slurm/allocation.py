"""A run inside an allocation that the user holds: its batch script runs here, and the allocation is kept."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from alignkd.run_folder.paths import RunPaths
from launcher.run.console import say

if TYPE_CHECKING:
    from rich.console import Console


def run_script_here(run: Path, console: Console) -> int:
    """Run the batch script and return its exit code: the same ranks and the same decision at the end as in
    a job of its own, but no requeue."""
    say(console, f"using the allocation {os.environ['SLURM_JOB_ID']}")
    environment = {**os.environ, "ALIGNKD_RUN": str(run)}
    # Ctrl-C is meant for srun, which shares the terminal. If this process died of it, the script would die
    # too: the ranks would keep training, and nothing would record how they end.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        return subprocess.run(["bash", str(RunPaths(run).job_script)], env=environment).returncode
    finally:
        signal.signal(signal.SIGINT, before)
