"""What is checked before anything is written or started. All problems are reported together."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alignkd.config import Config, warnings_of
from alignkd.config.slurm_section import SlurmSection
from alignkd.errors import CheckpointError, UserError
from alignkd.teacher_cache.check import checked_manifest
from alignkd.tracking.packages import missing_packages
from launcher.backends.base import Backend
from launcher.backends.devices import device_of
from launcher.backends.node_probe import model_folders
from launcher.plan.check import check_memory
from launcher.plan.sizes import run_sizes
from launcher.plan.workload import Cluster
from launcher.render.deepspeed import accumulation_steps
from launcher.run.disk import existing_parent
from launcher.run.folder import existing_run_problem, run_path

_STATE_BYTES = 12  # per trainable parameter: fp32 master weight and two moments


@dataclass(frozen=True)
class MemoryCheck:
    """``gpu_memory`` is in bytes; None: ``slurm.gpu_memory``, or unknown."""

    gpu_memory: int | None = None
    skip: bool = False


def check_stages(
    stages: Sequence[tuple[str | None, Config]],
    backend: Backend,
    cluster: Cluster,
    memory: MemoryCheck,
    replace: bool = False,
) -> tuple[list[str], list[str]]:
    """Problems and warnings of all stages, which run one after the other. With ``replace``, run folders that
    were never started are no problem."""
    problems: list[str] = []
    warnings: list[str] = []
    for index, (name, config) in enumerate(stages):
        earlier = [config for _, config in stages[:index]]
        prefix = f"[stage {name}] " if len(stages) > 1 else ""
        found, notes = _check_stage(config, earlier, backend, cluster, memory, replace)
        problems += [prefix + problem for problem in found]
        warnings += [prefix + note for note in notes]
    return problems, warnings


def _check_stage(
    config: Config,
    earlier: Sequence[Config],
    backend: Backend,
    cluster: Cluster,
    memory: MemoryCheck,
    replace: bool,
) -> tuple[list[str], list[str]]:
    """Problems and warnings. ``earlier`` are the stages that run before this one."""
    warnings = warnings_of(config)
    problems = launch_problems(config, cluster.ranks, [run_path(stage) for stage in earlier], replace)
    if not problems and not earlier:
        problems += space_problems(config)
    if not problems:
        warnings += model_notes(config) + tracker_warnings(config)
    refused, notes = backend.preflight(config, cluster)
    problems, warnings = problems + refused, warnings + notes
    if not problems and not memory.skip and device_of(config) != "cpu":
        refused, notes = check_memory(config, cluster, memory.gpu_memory, earlier)
        problems, warnings = problems + refused, warnings + notes
    return problems, warnings


def launch_problems(
    config: Config, world_size: int, upstream: Sequence[Path] = (), replace: bool = False
) -> list[str]:
    """Every reason not to start this run on ``world_size`` ranks (empty: none).

    ``upstream`` are runs of earlier stages: models in them do not exist yet, and the ranks check them.
    """
    problems = [problem for problem in [existing_run_problem(run_path(config), replace)] if problem]
    problems += data_problems(config) + task_problems(config)
    problems += [] if _has_other_python(config.slurm) else missing_packages(config.tracking)
    problems += _raised(lambda: accumulation_steps(config.training, world_size))
    read = [*model_folders(config).values(), *([config.model.adapters] if config.model.adapters else [])]
    if not any(_is_in(folder, run) for folder in read for run in upstream):
        problems += model_problems(config) or cache_problems(config)
    elif not any(_is_in(str(config.model.teacher), run) for run in upstream):
        problems += cache_problems(config, has_student=False)
    return problems


def tracker_warnings(config: Config) -> list[str]:
    """Packages of trackers that only this Python lacks, as far as is known."""
    if not _has_other_python(config.slurm):
        return []
    unknown = "it is missing here, and the ranks' own Python was not asked (slurm.python, or a container)"
    return [f"{problem}; {unknown}" for problem in missing_packages(config.tracking)]


def _has_other_python(slurm: SlurmSection) -> bool:
    """May the ranks run in another Python than this one?"""
    in_container = slurm.container.kind != "none" or bool(slurm.srun_options.get("container-image"))
    return in_container or slurm.python is not None


def cache_problems(config: Config, has_student: bool = True) -> list[str]:
    """Why the cache of the teacher does not fit this run, if it reads one. Hashes teacher and records."""
    if not config.distillation.enabled or config.teacher.placement != "cached":
        return []
    return _raised(lambda: checked_manifest(config, has_student))


def space_problems(config: Config) -> list[str]:
    """Is there room for the checkpoints that are kept? Sizes follow from the student's config.json."""
    try:
        sizes = run_sizes(config)
    except CheckpointError:
        return []  # another check reports it
    trainable, frozen = sum(sizes.trainable(config).values()), sum(sizes.frozen(config).values())
    weight_bytes = 4 if config.training.precision == "fp32" else 2
    one = trainable * (weight_bytes + _STATE_BYTES) + frozen * weight_bytes
    best = config.evaluation.every is not None
    # A new one is complete before an old one is deleted.
    count = (config.checkpoint.keep_last or 10) + 1 + best
    place = existing_parent(run_path(config))
    free = shutil.disk_usage(place).free
    if one * count <= free:
        return []
    return [
        f"{place}: {free / 1e9:.1f} GB free, and {count} checkpoints take about {one * count / 1e9:.1f} GB; "
        "make room, lower checkpoint.keep_last, or name another run.folder"
    ]


def data_problems(config: Config) -> list[str]:
    """Files and image folders that are missing or not readable."""
    problems = []
    for key, source in config.named_sources().items():
        problem = _unreadable(Path(source.file), "file")
        if problem:
            problems.append(
                f"{key}.file = {source.file}: {problem}; valid: a LLaVA-style JSON list or JSON Lines"
            )
        problem = None if source.image_folder is None else _unreadable(Path(source.image_folder), "folder")
        if problem:
            problems.append(f"{key}.image_folder = {source.image_folder}: {problem}")
    return problems


def task_problems(config: Config) -> list[str]:
    """Why the questions of ``evaluation.task`` cannot be asked: the task is unknown, or data are missing."""
    evaluation = config.evaluation
    if evaluation.every is None or evaluation.task is None or evaluation.task_data is None:
        return []
    from alignkd.evaluate.scoring import check_data  # reads tables with numpy, and most runs have no task
    from alignkd.evaluate.tasks.registry import task_named

    name, data = evaluation.task, Path(evaluation.task_data)
    return [
        f"evaluation.task: {problem}" for problem in _raised(lambda: check_data([task_named(name)], data))
    ]


def _unreadable(path: Path, kind: Literal["file", "folder"]) -> str | None:
    try:
        found = path.is_file() if kind == "file" else path.is_dir()
    except OSError as error:  # a parent folder may not be entered, or a server does not answer
        return str(error.strerror)
    if not found:
        return f"no such {kind}"
    wanted = os.R_OK if kind == "file" else os.R_OK | os.X_OK
    return None if os.access(path, wanted) else "this user may not read it"


def model_problems(config: Config) -> list[str]:
    """Missing model folders; else disagreements of teacher and student about tokens and pixels."""
    from alignkd.models.agreement import check_agreement, check_templates

    model = config.model
    named = model_folders(config)
    missing = [
        f"{key} = {folder}: no such folder{_made_by(folder, config)}"
        for key, folder in named.items()
        if not Path(folder).is_dir()
    ]
    missing += _adapter_problems(config)
    if missing:
        return missing
    if not config.distillation.enabled:  # only the student is used
        model = model.model_copy(update={"teacher": None})
    problems: list[str] = []
    problems += _raised(lambda: problems.extend(check_agreement(model, config.distillation.top_k)))
    return problems or check_templates(config)


def model_notes(config: Config) -> list[str]:
    from alignkd.models.agreement import grid_notes, untried_notes

    notes = untried_notes(config.model)
    return notes + grid_notes(config.model) if config.distillation.enabled else notes


def _made_by(folder: str, config: Config) -> str:
    """Names the run that will write a model which is missing."""
    runs = Path(config.run.folder)
    if runs not in Path(folder).parents:
        return ""
    run = Path(folder).relative_to(runs).parts[0]
    return f"; run {run} writes it when it ends: launch that first, or both with --stages"


def _adapter_problems(config: Config) -> list[str]:
    if config.model.adapters is None or not config.distillation.enabled:
        return []
    path = Path(config.model.adapters)
    file = path / "adapters.safetensors" if path.is_dir() else path
    valid = "the folder of a run with distillation that is finished, or its adapters.safetensors"
    if file.is_file():
        return []
    missing = f"no file {file}" if path.is_dir() else f"no such file or folder{_made_by(str(path), config)}"
    return [f"model.adapters = {path}: {missing}; valid: {valid}"]


def _is_in(folder: str, run: Path) -> bool:
    return run in (Path(folder), *Path(folder).parents)


def _raised(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except UserError as error:
        return [str(error)]
    return []
