"""``alignkd plan``: plan a run, advise settings for a GPU's memory, write them into the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkd.config import Config, load_config
from alignkd.config.dotted import get_value, split_key
from alignkd.config.yaml_reader import read_yaml
from alignkd.errors import ConfigError, UserError
from launcher.backends.devices import usual_gpus_per_node
from launcher.plan.advice import advise, changes
from launcher.plan.apply import apply_changes
from launcher.plan.check import configured_memory
from launcher.plan.plan import Plan, make_plan
from launcher.plan.sizes import run_sizes
from launcher.plan.upstream_stages import upstream_notes
from launcher.plan.workload import Cluster
from launcher.run.site import read_site


@dataclass(frozen=True)
class PlanRequest:
    config: Path
    nodes: int
    gpus_per_node: int | None  # None: slurm.gpus_per_node, or 1
    gpu_memory: int | None = None  # bytes of one GPU; None: slurm.gpu_memory, or unknown
    stage: str | None = None
    overrides: tuple[str, ...] = ()
    apply: bool = False  # the advice will be written into the file


@dataclass(frozen=True)
class AdvisedPlan:
    plan: Plan
    gpu_memory: int | None
    advised: Plan | None  # None: the memory of a GPU is unknown, or nothing fits
    notes: list[str]


def plan_run(request: PlanRequest) -> AdvisedPlan:
    """Raises UserError when the configuration or the models are not usable, or a GPU's memory is needed."""
    config = load_config(request.config, request.overrides, request.stage, read_site())
    memory = request.gpu_memory or configured_memory(config)
    if request.apply and memory is None:
        raise UserError("--apply needs the memory of a GPU: --gpu-memory 80G, or the key slurm.gpu_memory")
    others = _other_stages(request.config, request.stage)
    cluster = Cluster(request.nodes, request.gpus_per_node or usual_gpus_per_node(config.slurm))
    plan = make_plan(config, cluster, run_sizes(config, others))
    advised = None if memory is None else advise(plan, memory)
    return AdvisedPlan(plan, memory, advised, upstream_notes(config, others) + plan.sizes.notes)


def apply_advice(request: PlanRequest, found: AdvisedPlan) -> list[str]:
    """Write the advice and the overrides into the configuration; returns what was done, line by line.

    Raises UserError when nothing fits, or the file cannot be edited.
    """
    if found.advised is None:
        raise UserError(f"{request.config}: nothing fits, so nothing was written")
    # The advice was computed for the overrides, so both are written.
    values = _overridden(found.plan.config, request.overrides) | changes(found.plan, found.advised)
    return apply_changes(request.config, request.stage, values)


def _overridden(config: Config, overrides: Sequence[str]) -> dict[str, Any]:
    """The values of overridden keys as they were parsed."""
    document = config.model_dump()
    keys = [override.partition("=")[0].strip() for override in overrides]
    return {key: get_value(document, split_key(key)) for key in keys}


def _other_stages(path: Path, stage: str | None) -> list[Config]:
    """The file's other stages, which may train what this one starts from. Invalid ones are left out."""
    found = []
    names = (read_yaml(path).get("stages") or {}) if stage is not None else {}
    for name in names:
        with suppress(ConfigError):
            found += [load_config(path, (), name)] if name != stage else []
    return found
