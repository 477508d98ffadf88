"""What a run trains on, and the GPUs of this machine, found without torch."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alignkd.config import Config
    from alignkd.config.slurm_section import SlurmSection


def device_of(config: Config) -> str:
    """ "cpu" where the user chose it, else "auto": one GPU per rank, and never a silent change to the CPU."""
    return "cpu" if config.slurm.gpu_option == "none" else "auto"


def usual_gpus_per_node(slurm: SlurmSection) -> int:
    """Ranks per node of a job, unless an option gives their number."""
    return 1 if slurm.gpu_option == "none" else slurm.gpus_per_node or 1


def visible_gpus(environment: Mapping[str, str], dev: Path = Path("/dev")) -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES, in order: those the user left visible, else all of the driver's."""
    count = _driver_count(environment)
    if count is None:
        count = sum(1 for entry in dev.glob("nvidia*") if re.fullmatch(r"nvidia\d+", entry.name))
    names = [str(index) for index in range(count)]
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not names:
        return names
    visible = []
    for name in (part.strip() for part in chosen.split(",")):
        if not name or name == "-1" or (name.isdigit() and name not in names):
            break  # CUDA stops at the first name that is not a device
        visible.append(name)
    return visible


def _driver_count(environment: Mapping[str, str]) -> int | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", "-L"],
            capture_output=True,
            text=True,
            timeout=20,
            env={**os.environ, **environment},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode != 0:
        return None
    return sum(1 for line in done.stdout.splitlines() if line.startswith("GPU "))
