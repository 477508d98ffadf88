"""Resume a run: is it still the run of its checkpoint, and how do these ranks load that?"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignkd.checkpoint.placement import WEIGHTS, check_placement
from alignkd.checkpoint.resume import CheckpointSearch, load_checkpoint, load_converted
from alignkd.checkpoint.storage import Storage
from alignkd.config.schema import Config
from alignkd.data.image_sample import SAMPLES
from alignkd.distributed.ranks import Ranks
from alignkd.engine.state import RunIdentity, library_versions
from alignkd.errors import CheckpointError, UserError
from alignkd.models.loading import frozen_fingerprint
from alignkd.run_folder.checkpoints import read_manifest, step_folder, step_name
from alignkd.run_folder.drift import (
    IMAGES,
    accepts_images,
    allowed_changes,
    config_drift,
    conversion_problem,
    must_convert,
    saved_stage,
)
from alignkd.run_folder.layout import layout_problems, version_changes
from alignkd.run_folder.progress import Progress

log = logging.getLogger(__name__)


def resume_engine(
    engine: Any,
    run: Path,
    found: CheckpointSearch,
    identity: RunIdentity,
    config: Config,
    ranks: Ranks,
    progress: Progress,
    storage: Storage,
) -> RunIdentity:
    """Load the checkpoint that was found, if any, into ``engine``. Returns the identity with its ``frozen``
    part, which is known only then. Collective.

    Raises UserError when the run is not the one that was saved, CheckpointError when these ranks cannot load
    it. ``storage`` writes a conversion.
    """
    for reason in found.refused:
        log.warning("passed over %s", reason)
    manifest: dict[str, Any] = {}
    if found.step is not None:
        manifest = read_manifest(step_folder(run, found.step))
        _check_conversion(run, manifest, config, ranks)
        _check_drift(run, manifest, identity)
        _check_layout(run, manifest, identity, config, ranks)
        _load(engine, run, manifest, config, ranks, progress, storage)
        check_placement(engine, manifest.get(WEIGHTS), ranks)
        log.info("resumed at step %d", found.step)
    # After the load: a plain load restores the frozen weights, a converted one does not touch them.
    frozen = ranks.broadcast_object(frozen_fingerprint(engine.module, hashing=ranks.is_first))
    if manifest.get("frozen", frozen) != frozen:
        raise UserError(
            f"{run}: the student's frozen weights or buffers are not those of {step_name(manifest['step'])}: "
            "the files of model.student or model.vision_tower have changed; restore them"
        )
    return replace(identity, frozen=frozen)


def _check_conversion(run: Path, manifest: dict[str, Any], config: Config, ranks: Ranks) -> None:
    stage = config.student.zero_stage
    problem = conversion_problem(manifest, ranks.world_size, stage)
    if problem is None and must_convert(manifest, ranks.world_size, stage) and "frozen" not in manifest:
        problem = (
            "it was saved by a version that did not record the student's frozen weights; resume on "
            f"{manifest['world_size']} ranks until the next checkpoint"
        )
    if problem:
        raise CheckpointError(f"{run}: cannot resume from {step_name(manifest['step'])}: {problem}")


def _check_drift(run: Path, manifest: dict[str, Any], identity: RunIdentity) -> None:
    allowed = allowed_changes(run)
    problems = config_drift(manifest["config"], identity.config, allowed)
    if manifest["data"] != identity.data:
        problems.append("the data, the tokenizer or the templates have changed")
    if manifest["teacher"] != identity.teacher:
        problems.append("the teacher's weights have changed")
    images = manifest.get("images", identity.images)  # earlier versions did not record them
    if images["sizes"] != identity.images["sizes"]:
        line = f"{IMAGES}: image files have other sizes than before, or are missing ({SAMPLES} looked at)"
        if accepts_images(allowed, images["sizes"]):
            log.warning("%s; accepted", line)
        else:
            problems.append(line)
    elif images["times"] != identity.images["times"]:
        log.warning("image files have other modification times than before: copied, or written again?")
    if problems:
        raise UserError(
            f"{run}: not the run of its checkpoint step-{manifest['step']}\n  " + "\n  ".join(problems) + "\n"
            "Undo the change, or accept a key with `alignkd resume RUN --allow-change KEY`."
        )


def _check_layout(
    run: Path, manifest: dict[str, Any], identity: RunIdentity, config: Config, ranks: Ranks
) -> None:
    converts = must_convert(manifest, ranks.world_size, config.student.zero_stage)
    problems, harmless = layout_problems(manifest, identity.layout, converts=converts)
    for line in harmless + version_changes(manifest, library_versions()):
        log.warning("%s", line)
    if problems:
        raise CheckpointError(
            f"{run}: the shards of {step_name(manifest['step'])} have another layout than this run reads\n  "
            + "\n  ".join(problems)
            + "\nUndo the change, or start a new run from an exported student."
        )


def _load(
    engine: Any,
    run: Path,
    manifest: dict[str, Any],
    config: Config,
    ranks: Ranks,
    progress: Progress,
    storage: Storage,
) -> None:
    """Load a verified checkpoint, converted first if other ranks or another ZeRO stage wrote it."""
    step, stage = int(manifest["step"]), config.student.zero_stage
    if not must_convert(manifest, ranks.world_size, stage):
        load_checkpoint(engine, run, step, ranks)
        return
    log.info(
        "step-%d was written by %d ranks at ZeRO stage %d; converting it for %d at stage %d",
        *(step, manifest["world_size"], saved_stage(manifest), ranks.world_size, stage),
    )
    with progress.alive("converting"):
        load_converted(engine, run, step, ranks, config.training.seed, storage)
