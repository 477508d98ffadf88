"""How long saves take, as the manifests record it, and whether a stop signal leaves time for one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkd.run_folder.checkpoints import committed_steps, read_manifest, step_folder

TIMING = "timing"  # key of the manifest


def stop_seconds(manifest: Mapping[str, Any]) -> float | None:
    """Seconds from a stop signal to the commit, at worst, by what this save measured: the step under way is
    finished, a save that has just begun beside training is too, then everything is saved while training
    waits. None when the manifest does not tell."""
    try:
        saves = 2 if manifest["config"]["checkpoint"]["asynchronous"] else 1
        return float(manifest["step_seconds"]) + saves * float(manifest[TIMING]["save_seconds"])
    except (KeyError, TypeError, ValueError):
        return None


def measured_stop_seconds(run: Path) -> float | None:
    """By the run's newest checkpoint; None when there is none."""
    for step in committed_steps(run)[:1]:
        try:
            return stop_seconds(read_manifest(step_folder(run, step)))
        except (OSError, ValueError, KeyError, TypeError):
            return None
    return None


def lead_warning(measured: float | None, signal_seconds: int) -> str | None:
    """What to tell a user whose signal comes too late; None when it does not, or nothing was measured."""
    if measured is None or measured <= signal_seconds:
        return None
    return (
        f"a stop may take {measured:.0f} s, by the last save, and the signal before the time limit comes "
        f"{signal_seconds} s ahead (slurm.signal_seconds): the last save may not be done in time, and the "
        f"run would go on from the one before; set it to {2 * measured:.0f} or more"
    )
