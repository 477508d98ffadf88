"""Fit a run folder to another size, to another ZeRO stage or teacher.placement, or to this version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignkd.config import Config, load_run_config
from alignkd.config.combinations import divisors
from alignkd.config.schema import TrainingSection
from alignkd.errors import UserError
from alignkd.run_folder.atomic_files import read_json, write_json, write_text_atomic
from alignkd.run_folder.checkpoints import committed_steps, read_manifest, step_folder, step_name
from alignkd.run_folder.drift import conversion_problem
from alignkd.run_folder.paths import ENVIRONMENT_SCRIPT, RunPaths
from alignkd.text import counted, listed
from launcher.backends import backend_named
from launcher.backends.hostfile import Host
from launcher.plan.check import check_memory, configured_memory
from launcher.plan.workload import Cluster
from launcher.render.deepspeed import accumulation_steps, student_config, teacher_config
from launcher.render.job_scripts import is_current, render_scripts
from launcher.run.folder import write_scripts
from launcher.run.manifest import Manifest


def fit_run(
    run: Path,
    manifest: Manifest,
    nodes: int | None,
    gpus_per_node: int | None,
    hosts: Sequence[Host] = (),
    step: int | None = None,
) -> Manifest:
    """Make the run's files fit this size (None: unchanged) and return the new manifest.

    The global batch and the micro-batch are kept, accumulation follows. A resize that was interrupted is
    completed. ``step`` is the checkpoint to resume from, by default the newest. Raises UserError, before
    anything is written, for an impossible split, a ZeRO stage that cannot be converted, or a size that the
    back end cannot provide.
    """
    config = load_run_config(RunPaths(run).config)
    left = read_json(RunPaths(run).resize_journal) or {}
    nodes = nodes or left.get("nodes") or manifest.nodes
    gpus_per_node = gpus_per_node or left.get("gpus_per_node") or manifest.gpus_per_node
    size_changes = (nodes, gpus_per_node) != (manifest.nodes, manifest.gpus_per_node)
    stage = _rendered_stage(run)
    stage_changes = stage not in (None, config.student.zero_stage)
    rendered = read_json(RunPaths(run).teacher_deepspeed)
    placement_changes = stage is not None and _offloads(rendered) != _offloads(
        teacher_config(config, manifest.device)
    )
    if not (size_changes or stage_changes or placement_changes or left or hosts):
        return manifest
    wanted = replace(
        manifest,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        world_size=nodes * gpus_per_node,
        accumulation_steps=_accumulation(config.training, nodes, gpus_per_node),
    )
    _check_checkpoint(run, wanted, config, step)
    _check_place(run, wanted, config, hosts)
    backend_named(wanted.backend).prepare(run, hosts)
    _rewrite(run, wanted, config)
    return wanted


def memory_warnings(run: Path, manifest: Manifest) -> list[str]:
    """Fewer ranks hold larger shards. Only a warning: the user may have launched with the check skipped."""
    config = load_run_config(RunPaths(run).config)
    if manifest.device == "cpu" or configured_memory(config) is None:
        return []
    return check_memory(config, Cluster(manifest.nodes, manifest.gpus_per_node), None)[0]


def _rendered_stage(run: Path) -> Any:
    return (read_json(RunPaths(run).student_deepspeed) or {}).get("zero_optimization", {}).get("stage")


def _offloads(teacher: dict[str, Any] | None) -> bool | None:
    """Does a sharded teacher keep its shards in host memory? None where no teacher is sharded."""
    return None if teacher is None else "offload_param" in teacher.get("zero_optimization", {})


def _accumulation(training: TrainingSection, nodes: int, gpus_per_node: int) -> int:
    whole, micro = training.global_batch_size, training.micro_batch_size
    if training.tokens_per_micro_batch is None and whole % (micro * nodes * gpus_per_node) != 0:
        fitting = [count for count in divisors(whole) if whole % (micro * count * gpus_per_node) == 0]
        raise UserError(
            f"training.global_batch_size = {whole} cannot be split over {counted(nodes, 'node')} x "
            f"{counted(gpus_per_node, 'rank')} x training.micro_batch_size = {micro}; node counts that fit "
            f"with {counted(gpus_per_node, 'rank')} each: {listed(fitting) or 'none'}"
        )
    return accumulation_steps(training, nodes * gpus_per_node)


def _check_checkpoint(run: Path, wanted: Manifest, config: Config, step: int | None) -> None:
    steps = committed_steps(run) if step is None else [step]
    if not steps:
        return  # nothing has been saved, so the run starts from scratch
    try:
        saved = read_manifest(step_folder(run, steps[0]))
        problem = conversion_problem(saved, wanted.world_size, config.student.zero_stage)
    except (OSError, ValueError, KeyError, TypeError):
        return  # the ranks search for one that is readable
    if problem:
        raise UserError(f"{run}: cannot resume from {step_name(steps[0])}: {problem}")


def _check_place(run: Path, wanted: Manifest, config: Config, hosts: Sequence[Host]) -> None:
    problems = backend_named(wanted.backend).resize_problems(run, wanted, config, hosts)
    if problems:
        raise UserError(f"{run}: cannot run on {counted(wanted.nodes, 'node')}\n  " + "\n  ".join(problems))


def renew_scripts(run: Path, manifest: Manifest) -> bool:
    """Re-render job scripts of another version: they call modules that may have moved. True if it did.

    What was there is kept as NAME.old, since it may have been edited by hand. env.sh stays: it calls nothing
    of alignkd.
    """
    scripts = [RunPaths(run).job_script, RunPaths(run).rank_script]
    if all(is_current(path.read_text(encoding="utf-8")) for path in scripts if path.exists()):
        return False
    for path in scripts:
        if path.exists():
            write_text_atomic(path.with_name(path.name + ".old"), path.read_text(encoding="utf-8"))
    config = load_run_config(RunPaths(run).config)
    _write_scripts(run, render_scripts(config, run, manifest.nodes, manifest.gpus_per_node))
    return True


def _rewrite(run: Path, wanted: Manifest, config: Config) -> None:
    """Each file is replaced atomically; after an interruption, the journal makes the next resume finish."""
    nodes, gpus_per_node = wanted.nodes, wanted.gpus_per_node
    student = student_config(config, wanted.world_size, wanted.device)
    teacher = teacher_config(config, wanted.device)
    scripts = render_scripts(config, run, nodes, gpus_per_node)
    write_json(RunPaths(run).resize_journal, {"nodes": nodes, "gpus_per_node": gpus_per_node})
    write_json(RunPaths(run).student_deepspeed, student)
    if teacher is not None:
        write_json(RunPaths(run).teacher_deepspeed, teacher)
    else:
        RunPaths(run).teacher_deepspeed.unlink(missing_ok=True)
    _write_scripts(run, scripts)
    write_json(RunPaths(run).manifest, wanted.as_dict())
    RunPaths(run).resize_journal.unlink()


def _write_scripts(run: Path, scripts: dict[str, str]) -> None:
    """All but an env.sh that exists: it does not depend on the size, and may have been edited by hand."""
    kept = {ENVIRONMENT_SCRIPT} if RunPaths(run).environment_script.exists() else set()
    write_scripts(run, {name: text for name, text in scripts.items() if name not in kept})
