"""How long saves take, as the manifests record it, and whether a stop signal leaves time for one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkd.run_folder.checkpoints import committed_steps, read_manifest, step_folder

TIMING = "timing"  # key of the manifest


def stop_seconds(manifest: Mapping[str, Any]) -> float | None:
    """Seconds from a stop signal to the commit in the worst case, from what this save measured: the step
    under way is finished, then an asynchronous save that has just begun, then everything is saved while
    training waits. None when the manifest does not say."""
    try:
        saves = 2 if manifest["config"]["checkpoint"]["asynchronous"] else 1
        return float(manifest["step_seconds"]) + saves * float(manifest[TIMING]["save_seconds"])
    except (KeyError, TypeError, ValueError):
        return None


def measured_stop_seconds(run: Path) -> float | None:
    """:func:`stop_seconds` of the run's newest checkpoint; None when there is none."""
    for step in committed_steps(run)[:1]:
        try:
            return stop_seconds(read_manifest(step_folder(run, step)))
        except (OSError, ValueError, KeyError, TypeError):
            return None
    return None


def lead_warning(measured: float | None, signal_seconds: int) -> str | None:
    """A warning for a user whose signal comes too late; None when it does not, or nothing was measured."""
    if measured is None or measured <= signal_seconds:
        return None
    return (
        f"by the last save, a stop may take {measured:.0f} s, but the signal comes {signal_seconds} s before "
        "the time limit (slurm.signal_seconds): the last save may not finish in time, and the run would "
        f"resume from the one before; set it to {2 * measured:.0f} or more"
    )
