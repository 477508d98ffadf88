"""Does a finished cache fit a run? Asked by ``alignkd launch`` before anything queues, and by rank 0."""

from __future__ import annotations

from pathlib import Path

from alignkd.config.schema import Config
from alignkd.config.teacher_combinations import divergence_problems
from alignkd.errors import CheckpointError, UserError
from alignkd.models.configuration import read_model_config
from alignkd.models.families.table import MOBILEVLM, family_name
from alignkd.teacher_cache.folder import Identity, Manifest, read_manifest, size_problems
from alignkd.teacher_cache.key import cache_key, differences, top_k_of

SHOWN = 3


def checked_manifest(config: Config, has_student: bool = True) -> Manifest:
    """The manifest of ``teacher.cache``. Raises UserError when the cache is not finished, lacks a shard, or
    is of another teacher or other data, naming which part of its key differs. Without ``has_student``, what
    the student's folder says is not compared."""
    folder = cache_folder(config)
    check_teacher(config)
    manifest = read_manifest(folder)
    problems = differences(manifest.identity.key, cache_key(config, manifest.identity.images, has_student))
    if problems:
        raise UserError(_lines(f"teacher.cache = {folder}: the cache is stale; what has changed:", problems))
    problems = size_problems(folder, manifest)
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        hint = "`alignkd cache CONFIG` writes again what is missing"
        raise UserError(
            _lines(f"teacher.cache = {folder}: the cache is damaged; {hint}", problems[:SHOWN] + more)
        )
    return manifest


def check_samples(config: Config, identity: Identity, samples: int, entries: str) -> None:
    """Raises UserError when the cache has other samples than the run's index, whose size and
    ``Index.entries_hash`` are given: another version of alignkd may have kept other entries of the same
    records, and their numbers would then mean other samples."""
    if (identity.samples, identity.entries) != (samples, entries):
        raise UserError(
            f"teacher.cache = {cache_folder(config)}: the cache is stale: {identity.samples:,} samples "
            f"in it and {samples:,} in the run, which are not the same entries of the records; write it anew"
        )


def cache_folder(config: Config) -> Path:
    """Raises UserError when the configuration names none."""
    if config.teacher.cache is None:
        raise UserError("teacher.cache is missing; valid: the folder of the teacher's cache")
    return Path(config.teacher.cache)


def check_teacher(config: Config) -> None:
    """Raises UserError for a teacher whose answers cannot be cached in the form that is configured."""
    if not config.distillation.enabled or config.model.teacher is None:
        raise UserError("there is no teacher to cache; valid: model.teacher with distillation.enabled = true")
    for problem in divergence_problems(config.distillation, config.teacher):
        raise UserError(problem)
    try:
        family = family_name(Path(config.model.teacher))
    except CheckpointError as error:
        raise UserError(f"model.teacher: {error}") from None
    if family != MOBILEVLM[0]:
        raise UserError(
            f"model.teacher = {config.model.teacher}: a teacher of the family {family} cannot be cached; "
            f"valid: a {MOBILEVLM[0]} teacher, or another teacher.placement"
        )
    top_k = top_k_of(config)
    if top_k is None:
        return
    vocabulary = read_model_config(config.model.teacher).vocab_size
    if top_k >= vocabulary:
        raise UserError(
            f"teacher.cache_top_k = {top_k}: the teacher's vocabulary has {vocabulary:,} tokens; valid: "
            "fewer than that, 16 to 128 as a rule"
        )


def _lines(first: str, problems: list[str]) -> str:
    return "\n  ".join([first, *problems])
