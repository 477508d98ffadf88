"""Fit a run folder to another number of nodes or ranks, or to the ZeRO stage in its config.yaml."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignkd.config import Config, load_run_config
from alignkd.config.combinations import divisors, listed
from alignkd.config.schema import TrainingSection
from alignkd.errors import UserError
from alignkd.run_folder.atomic_files import read_json, write_json, write_text_atomic
from alignkd.run_folder.checkpoints import committed_steps, read_manifest, step_name
from alignkd.run_folder.drift import conversion_problem
from alignkd.run_folder.paths import ENVIRONMENT_SCRIPT, RunPaths
from launcher.backends.devices import visible_gpus
from launcher.backends.hostfile import Host
from launcher.backends.local import gpu_problem
from launcher.backends.slurm.client import in_allocation
from launcher.backends.slurm.preflight import slurm_problems
from launcher.backends.ssh import write_hosts
from launcher.plan.check import check_memory, configured_memory
from launcher.plan.workload import Cluster
from launcher.render.deepspeed import accumulation_steps, student_config, teacher_config
from launcher.render.job_scripts import render_scripts
from launcher.run.manifest import Manifest


def fit_run(
    run: Path,
    manifest: Manifest,
    nodes: int | None,
    gpus_per_node: int | None,
    hosts: Sequence[Host] = (),
    step: int | None = None,
) -> Manifest:
    """The manifest of the run at this size (None: as it is), after its files were made to fit.

    Global batch and micro-batch stay, accumulation follows. A resize that was cut off is finished. ``step``
    is the checkpoint to go on from, by default the newest. Raises UserError, before anything is written, for
    what cannot be: a split, a ZeRO stage, a size that the back end does not have.
    """
    config = load_run_config(RunPaths(run).config)
    left = read_json(RunPaths(run).resize_journal) or {}
    nodes = nodes or left.get("nodes") or manifest.nodes
    gpus_per_node = gpus_per_node or left.get("gpus_per_node") or manifest.gpus_per_node
    size_changes = (nodes, gpus_per_node) != (manifest.nodes, manifest.gpus_per_node)
    stage_changes = _rendered_stage(run) not in (None, config.student.zero_stage)
    if not (size_changes or stage_changes or left or hosts):
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
    if hosts:
        write_hosts(run, hosts)
    _rewrite(run, wanted, config)
    return wanted


def memory_warnings(run: Path, manifest: Manifest) -> list[str]:
    """Fewer ranks hold larger shards. A warning only: the user may have launched without the check."""
    config = load_run_config(RunPaths(run).config)
    if manifest.device == "cpu" or configured_memory(config) is None:
        return []
    return check_memory(config, Cluster(manifest.nodes, manifest.gpus_per_node), None)[0]


def _rendered_stage(run: Path) -> Any:
    return (read_json(RunPaths(run).student_deepspeed) or {}).get("zero_optimization", {}).get("stage")


def _accumulation(training: TrainingSection, nodes: int, gpus_per_node: int) -> int:
    whole, micro = training.global_batch_size, training.micro_batch_size
    if training.tokens_per_micro_batch is None and whole % (micro * nodes * gpus_per_node) != 0:
        fitting = [count for count in divisors(whole) if whole % (micro * count * gpus_per_node) == 0]
        raise UserError(
            f"training.global_batch_size = {whole} cannot be split over {nodes} nodes x {gpus_per_node} ranks"
            f" x training.micro_batch_size = {micro}; node counts that fit with {gpus_per_node} ranks each: "
            f"{listed(fitting) or 'none'}"
        )
    return accumulation_steps(training, nodes * gpus_per_node)


def _check_checkpoint(run: Path, wanted: Manifest, config: Config, step: int | None) -> None:
    steps = committed_steps(run) if step is None else [step]
    if not steps:
        return  # nothing is saved yet: it begins anew
    try:
        saved = read_manifest(RunPaths(run).checkpoints / step_name(steps[0]))
        problem = conversion_problem(saved, wanted.world_size, config.student.zero_stage)
    except (OSError, ValueError, KeyError, TypeError):
        return  # the ranks look for one that can be read
    if problem:
        raise UserError(f"{run}: cannot go on from {step_name(steps[0])}: {problem}")


def _check_place(run: Path, wanted: Manifest, config: Config, hosts: Sequence[Host]) -> None:
    problems: list[str] = []
    if hosts and wanted.backend != "ssh":
        problems = ["--hostfile is for runs of --backend ssh"]
    elif wanted.backend == "local":
        problems = [text for text in [gpu_problem(run, wanted, visible_gpus(os.environ))] if text]
    elif wanted.backend == "slurm" and not in_allocation():
        problems = slurm_problems(config, wanted.nodes, wanted.gpus_per_node)
    elif wanted.backend == "ssh":
        known = hosts or [Host(**entry) for entry in (read_json(RunPaths(run).hosts) or {}).get("hosts", [])]
        if len(known) < wanted.nodes:
            problems = [
                f"--nodes {wanted.nodes}: {RunPaths(run).hosts} has {len(known)} hosts; "
                "name more with --hostfile"
            ]
        elif wanted.gpus_per_node > known[0].slots:
            problems = [f"--gpus-per-node {wanted.gpus_per_node}: the hosts have {known[0].slots} slots each"]
    if problems:
        raise UserError(f"{run}: cannot run on {wanted.nodes} nodes\n  " + "\n  ".join(problems))


def _rewrite(run: Path, wanted: Manifest, config: Config) -> None:
    """Each file is replaced whole; the journal lets the next resume finish what was cut off between two."""
    nodes, gpus_per_node = wanted.nodes, wanted.gpus_per_node
    student = student_config(config, wanted.world_size, wanted.device)
    teacher = teacher_config(config, wanted.device)
    scripts = render_scripts(config, run, nodes, gpus_per_node)
    if RunPaths(run).environment_script.exists():
        del scripts[ENVIRONMENT_SCRIPT]  # no size is in it, and it may have been edited by hand
    write_json(RunPaths(run).resize_journal, {"nodes": nodes, "gpus_per_node": gpus_per_node})
    write_json(RunPaths(run).student_deepspeed, student)
    if teacher is not None:
        write_json(RunPaths(run).teacher_deepspeed, teacher)
    for name, text in scripts.items():
        write_text_atomic(run / name, text, mode=0o755)
    write_json(RunPaths(run).manifest, wanted.as_dict())
    RunPaths(run).resize_journal.unlink()
