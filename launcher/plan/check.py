"""Whether a run fits into its GPUs, checked by ``alignkd launch`` before anything is written."""

from __future__ import annotations

import re
from collections.abc import Sequence

from alignkd.config import Config
from alignkd.errors import UserError
from launcher.plan.plan import GIB, Plan, make_plan
from launcher.plan.show import verdict
from launcher.plan.sizes import run_sizes
from launcher.plan.workload import Cluster


def check_memory(
    config: Config, cluster: Cluster, gpu_memory: int | None, stages: Sequence[Config] = ()
) -> tuple[list[str], list[str]]:
    """(reasons not to launch, warnings about what could not be checked). ``stages`` run before this one."""
    gpu_memory = gpu_memory or configured_memory(config)
    if gpu_memory is None:
        return [], [
            "memory was not checked: the memory of a GPU is unknown; set --gpu-memory or slurm.gpu_memory"
        ]
    try:
        plan = make_plan(config, cluster, run_sizes(config, stages))
    except UserError as error:
        return [], [f"memory was not checked: {error}"]
    if plan.fits(gpu_memory):
        return [], []
    reason = f"{verdict(plan, gpu_memory)}{_assumption(plan)}"
    return [f"{reason}; see `alignkd plan`, or launch with --skip-memory-check"], []


def _assumption(plan: Plan) -> str:
    """Of what the verdict may depend on: pictures as large as the teacher's processor takes them."""
    student, teacher = plan.sizes.student, plan.sizes.teacher
    if teacher is None or teacher.images is None or teacher.images.is_fixed:
        return ""
    tokens = teacher.shapes.vision_tokens
    if tokens <= student.shapes.vision_tokens:
        return ""
    return f", if an image has {tokens} vision tokens for the teacher, whose processor allows so many"


def configured_memory(config: Config) -> int | None:
    return None if config.slurm.gpu_memory is None else memory_bytes(config.slurm.gpu_memory)


def memory_bytes(text: str) -> int:
    """Bytes of a size such as ``80G``, in units of 1024 as in Slurm; 0 for an invalid size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([MGT])(?:i?B)?", text, re.IGNORECASE)
    if match is None:
        return 0
    return int(float(match[1]) * GIB * {"M": 1 / 1024, "G": 1, "T": 1024}[match[2].upper()])
