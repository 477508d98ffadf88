"""Find the newest checkpoint that is what was written, and load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignkd.checkpoint.layout import (
    MANIFEST,
    checkpoints_folder,
    committed_steps,
    differences,
    read_manifest,
    share_of,
    step_name,
)
from alignkd.checkpoint.rank_state import load_rank_state
from alignkd.checkpoint.storage import ShardFiles
from alignkd.engine.ranks import Ranks
from alignkd.errors import CheckpointError


def find_checkpoint(run: Path, ranks: Ranks) -> tuple[int | None, list[str]]:
    """The newest checkpoint whose files fit its manifest, and why newer ones were passed over. Collective.

    Rank 0 decides what is looked at, each rank hashes a share of the files, and all get the verdict. Raises
    CheckpointError when there are marked checkpoints but none is whole.
    """
    steps: list[int] = ranks.broadcast_object(committed_steps(run) if ranks.is_first else None)
    refused: list[str] = []
    for step in steps:
        mine = _problems(checkpoints_folder(run) / step_name(step), ranks)
        problems = [problem for part in ranks.gather_objects(mine) for problem in part]
        if not problems:
            return step, refused
        refused.append(f"{step_name(step)}: {'; '.join(sorted(set(problems))[:3])}")
    if refused:
        raise CheckpointError(f"{checkpoints_folder(run)}: no usable checkpoint\n  " + "\n  ".join(refused))
    return None, refused


def load_checkpoint(engine: Any, run: Path, step: int, ranks: Ranks) -> dict[str, Any]:
    """Load a checkpoint that :func:`find_checkpoint` has verified; returns its manifest. Collective."""
    folder = checkpoints_folder(run) / step_name(step)
    manifest = read_manifest(folder)
    if manifest["world_size"] != ranks.world_size:
        raise CheckpointError(
            f"{folder} was written by {manifest['world_size']} ranks, and this run has {ranks.world_size}; "
            "start it with the same nodes and GPUs per node"
        )
    files = engine.checkpoint_engine
    assert isinstance(files, ShardFiles)
    files.verified = frozenset(folder / name for name in manifest["files"])
    engine.load_checkpoint(str(folder.parent), tag=folder.name)
    files.verified = frozenset()
    load_rank_state(folder, ranks.rank)
    return manifest


def _problems(folder: Path, ranks: Ranks) -> list[str]:
    try:
        files: dict[str, Any] = read_manifest(folder)["files"]
        return differences(folder, files, share_of(sorted(files), ranks.rank, ranks.world_size))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} cannot be read ({error})"]
