"""Find the newest checkpoint that is what was written, and load it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkd.checkpoint.rank_state import load_rank_state, seed_rank
from alignkd.checkpoint.shard_files import shard_files
from alignkd.checkpoint.storage import Storage
from alignkd.checkpoint.universal import convert
from alignkd.checkpoint.universal_load import load_universal
from alignkd.distributed.ranks import Ranks
from alignkd.errors import CheckpointError, TrainingError
from alignkd.run_folder.checkpoints import (
    committed_steps,
    read_manifest,
    step_folder,
    step_name,
    universal_folder,
    was_put_aside,
)
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.patience import PATIENCE_SECONDS, Patience
from alignkd.run_folder.saved_steps import missing_checkpoints, recorded_save
from alignkd.run_folder.verification import (
    NO_PATIENCE,
    hash_differences,
    share_of,
    verify_sizes,
)

log = logging.getLogger(__name__)
CONFIGURED = ("rate_name", "base_rate", "weight_decay")  # what the configuration says of a parameter group
NEEDED_TO_RESUME = ("step", "world_size", "config", "data", "teacher")  # of a manifest


@dataclass(frozen=True)
class CheckpointSearch:
    """What :func:`find_checkpoint` has found."""

    step: int | None  # None when there is no checkpoint
    verified: tuple[int, ...]  # steps that retention may rely on, newest first: ``step`` and older ones
    refused: tuple[str, ...]  # newer ones that were passed over, with the reason
    refused_steps: tuple[int, ...] = ()


def find_checkpoint(run: Path, ranks: Ranks, keep_last: int | None) -> CheckpointSearch:
    """The newest checkpoint whose files fit its manifest. Collective.

    Rank 0 alone looks at folders and sizes; each rank hashes a share of the newest checkpoint's files, and
    all get the same answer. Of older ones, up to ``keep_last``, only names and sizes are compared, so that
    retention knows what it can rely on. Raises CheckpointError when there are marked checkpoints but none is
    whole, or none at all although the run's records know of a save; TrainingError when one cannot be read:
    that may be the file system's fault, and resuming from an older one would throw work away.
    """
    patience = Patience(PATIENCE_SECONDS)
    steps, missing = ranks.broadcast_object(_visible_steps(run, patience) if ranks.is_first else None)
    if missing is not None:
        raise CheckpointError(missing)
    refused: list[str] = []
    for position, step in enumerate(steps):
        problems = _agreed_problems(step_folder(run, step), ranks, NEEDED_TO_RESUME, patience)
        if not problems:
            older = steps[position + 1 :]
            whole = ranks.broadcast_object(
                _of_right_size(run, older, (keep_last or 1) - 1) if ranks.is_first else None
            )
            return CheckpointSearch(step, (step, *whole), tuple(refused), tuple(steps[:position]))
        refused.append(f"{step_name(step)}: {_shown(problems)}")
    if refused:
        raise CheckpointError(f"{RunPaths(run).checkpoints}: no usable checkpoint\n  " + "\n  ".join(refused))
    return CheckpointSearch(None, (), ())


def _of_right_size(run: Path, steps: list[int], count: int) -> list[int]:
    """The first ``count`` of ``steps`` whose files are there with their sizes."""
    found: list[int] = []
    for step in steps:
        if len(found) == count:
            break
        try:
            problems, _ = verify_sizes(step_folder(run, step), needed=NEEDED_TO_RESUME)
        except OSError as error:  # it is not resumed from, so it only has to be kept
            problems = [str(error)]
        if problems:
            log.warning("%s does not count: %s", step_name(step), _shown(problems))
        else:
            found.append(step)
    return found


def _visible_steps(run: Path, patience: Patience) -> tuple[list[int], str | None]:
    """Marked steps, newest first, or why there must be some. Other hosts' folders may appear late: the newest
    save on record is waited for, unless it was put aside."""
    patience.until(lambda: missing_checkpoints(run) is None)
    saved = recorded_save(run)
    newest = 0 if saved is None or was_put_aside(step_folder(run, saved.step)) else saved.step
    patience.until(lambda: max(committed_steps(run), default=0) >= newest)
    missing, steps = missing_checkpoints(run), committed_steps(run)
    if steps and saved is not None and saved.step > steps[0]:
        log.warning(
            "step-%d was saved (%s) and is not among the checkpoints; the newest is step-%d",
            *(saved.step, saved.source, steps[0]),
        )
    return steps, missing


def load_converted(engine: Any, run: Path, step: int, ranks: Ranks, seed: int, storage: Storage) -> None:
    """Load a checkpoint of another number of ranks, or of ZeRO stage 1 at 2 or the other way round, that
    :func:`find_checkpoint` has verified. Collective.

    Rank 0 converts it unless that was done before; a conversion that is not what was written is named and
    made again. What DeepSpeed leaves out (frozen weights, buffers) stays as it is in the engine.
    """
    folder = universal_folder(run, step)
    for _ in range(2):
        ranks.run_on_rank0(lambda: convert(run, step, storage))
        problems = _agreed_problems(folder, ranks)
        if not problems:
            load_universal(engine, folder)
            seed_rank(seed, step, ranks.rank)
            return
        log.warning("%s: %s; converting again", folder, _shown(problems))
        ranks.run_on_rank0(lambda: storage.remove(folder))
    raise CheckpointError(f"{folder}: {_shown(problems)}, twice in a row; the disk may be failing")


def load_checkpoint(engine: Any, run: Path, step: int, ranks: Ranks) -> None:
    """Load a checkpoint that :func:`find_checkpoint` has verified, at its own size and stage. Collective."""
    folder = step_folder(run, step)
    files = shard_files(engine)
    files.verified = frozenset(folder / name for name in read_manifest(folder)["files"])
    # The optimizer's groups come back as they were saved; what the configuration says now is put back.
    settings = [{key: group[key] for key in CONFIGURED} for group in engine.optimizer.param_groups]
    engine.load_checkpoint(str(folder.parent), tag=folder.name)
    for group, own in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(own)
    files.verified = frozenset()
    load_rank_state(folder, ranks.rank)


def _agreed_problems(
    folder: Path, ranks: Ranks, needed: tuple[str, ...] = (), patience: Patience = NO_PATIENCE
) -> list[str]:
    """What ``verify`` says of a checkpoint, by all ranks together. Rank 0 looks at names and sizes: a walk by
    every rank would be 512 times the load on a metadata server. Each rank hashes its share. Collective."""
    problems: list[str] = []
    files: dict[str, Any] = {}
    unreadable = None
    try:
        if ranks.is_first:
            problems, files = verify_sizes(folder, needed=needed, patience=patience)
    except OSError as error:
        unreadable = f"rank 0: {error}"
    problems, files, unreadable = ranks.broadcast_object((problems, files, unreadable))
    if not problems and unreadable is None:
        try:
            share = share_of(files, ranks.rank, ranks.world_size)
            problems = hash_differences(folder, files, share, patience)
        except OSError as error:
            unreadable = f"rank {ranks.rank}: {error}"
        answers = ranks.gather_objects((problems, unreadable))
        problems = [problem for found, _ in answers for problem in found]
        unreadable = next((failure for _, failure in answers if failure is not None), None)
    if unreadable is not None:
        raise TrainingError(f"{folder}: cannot be read: {unreadable}")
    return problems


def _shown(problems: list[str]) -> str:
    return "; ".join(sorted(set(problems))[:3])
