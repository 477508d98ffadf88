"""A training run's state on disk: the student's engine through DeepSpeed, and each rank's random states.

The data position needs no state of its own: batches are a pure function of the optimizer step, which is the
checkpoint's name.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from alignkd.checkpoint.layout import (
    MANIFEST,
    MARKER,
    checkpoints_folder,
    committed_steps,
    data_files,
    describe,
    difference,
    flush_to_disk,
    read_manifest,
    share_of,
    step_name,
)
from alignkd.checkpoint.rank_state import load_rank_state, save_rank_state
from alignkd.engine.ranks import Ranks
from alignkd.errors import CheckpointError


def save_checkpoint(engine: Any, run: Path, step: int, facts: dict[str, Any], ranks: Ranks) -> Path:
    """Write and commit ``checkpoints/step-N``. Collective. ``facts`` go into the manifest as they are."""
    parent = checkpoints_folder(run)
    partial, final = parent / (step_name(step) + ".tmp"), parent / step_name(step)
    if ranks.is_first:
        parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)  # unmarked, or the step would not be made again
    ranks.barrier()  # nobody writes into a folder that rank 0 still removes
    engine.save_checkpoint(str(parent), tag=partial.name, save_latest=False)
    save_rank_state(partial, ranks.rank)
    ranks.barrier()  # every rank's files are there before they are listed and hashed
    mine = {
        name: describe(partial, name) for name in share_of(data_files(partial), ranks.rank, ranks.world_size)
    }
    for name in mine:
        flush_to_disk(partial / name)
    files = {name: entry for part in ranks.gather_objects(mine) for name, entry in part.items()}
    if ranks.is_first:
        manifest = {
            "step": step,
            "world_size": ranks.world_size,
            **facts,
            "files": dict(sorted(files.items())),
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        flush_to_disk(partial / MANIFEST)
        flush_to_disk(partial)
        partial.rename(final)
        (final / MARKER).touch()
        flush_to_disk(final)
        flush_to_disk(parent)
    ranks.barrier()  # no rank goes on, or exits, before the checkpoint counts
    return final


def find_checkpoint(run: Path, ranks: Ranks) -> tuple[int | None, list[str]]:
    """The newest checkpoint whose files fit its manifest, and why newer ones were passed over. Collective.

    Raises CheckpointError when there are marked checkpoints but none is whole.
    """
    steps: list[int] = ranks.broadcast_object(committed_steps(run) if ranks.is_first else None)
    refused: list[str] = []
    for step in steps:
        problems = _problems(run, step, ranks)
        if not problems:
            return step, refused
        refused.append(f"{step_name(step)}: {'; '.join(problems[:3])}")
    if refused:
        raise CheckpointError(f"{checkpoints_folder(run)}: no usable checkpoint\n  " + "\n  ".join(refused))
    return None, refused


def load_checkpoint(engine: Any, run: Path, step: int, ranks: Ranks) -> dict[str, Any]:
    """Load a checkpoint that :func:`find_checkpoint` has verified; returns its manifest. Collective."""
    manifest = read_manifest(run, step)
    if manifest["world_size"] != ranks.world_size:
        raise CheckpointError(
            f"{checkpoints_folder(run) / step_name(step)} was written by {manifest['world_size']} ranks, and "
            f"this run has {ranks.world_size}; start it with the same nodes and GPUs per node"
        )
    engine.load_checkpoint(str(checkpoints_folder(run)), tag=step_name(step))
    load_rank_state(checkpoints_folder(run) / step_name(step), ranks.rank)
    return manifest


def _problems(run: Path, step: int, ranks: Ranks) -> list[str]:
    """Each rank hashes its share of the files; all get the verdict."""
    folder = checkpoints_folder(run) / step_name(step)
    try:
        files: dict[str, Any] = read_manifest(run, step)["files"]
        mine = share_of(sorted(files), ranks.rank, ranks.world_size)
        found = [problem for name in mine if (problem := difference(folder, name, files[name]))]
        # DeepSpeed would unpickle a stranger, so it rules the checkpoint out.
        found += [f"{name} is not in the manifest" for name in data_files(folder) if name not in files]
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = [f"{MANIFEST} cannot be read ({error})"]
    return [problem for part in ranks.gather_objects(found) for problem in part]
