"""A plan as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from launcher.plan.advice import changes, largest_micro_batch
from launcher.plan.cached import cache_as_dict
from launcher.plan.plan import Plan
from launcher.plan.roofline import Chip, roofline


def plan_as_dict(plan: Plan, gpu_memory: int | None, advised: Plan | None, chip: Chip) -> dict[str, Any]:
    """In bytes, elements, FLOP and seconds, not rounded."""
    sizes, work = plan.sizes, plan.work
    found = roofline(plan.config, plan.held, work, plan.compute, chip)
    return {
        "nodes": plan.cluster.nodes,
        "gpus_per_node": plan.cluster.gpus_per_node,
        "workload": {
            **asdict(work),
            "tokens": work.tokens,
            "images": work.images,
            "supervised": work.supervised,
        },
        "parameters": {
            "teacher": None if sizes.teacher is None else sizes.teacher.count(),
            "student": sizes.student.count(),
            "adapters": sum(sizes.adapters.values()),
            "trainable": sum(sizes.trainable(plan.config).values()),
        },
        "memory": {
            "parts": [asdict(part) for part in plan.memory.parts],
            "peak_phase": plan.memory.peak_phase,
            "tensors": plan.memory.peak,
            "needed": plan.needed,
            "teacher_alive_at_most": plan.memory.teacher_alive,
            "host_per_node": plan.host_per_node,
            "gpu": gpu_memory,
            "fits": None if gpu_memory is None else plan.fits(gpu_memory),
            "largest_micro_batch": None if gpu_memory is None else largest_micro_batch(plan, gpu_memory),
        },
        "traffic": [
            {
                **asdict(transfer),
                "received_by_rank": transfer.received_by_rank,
                "entering_node": transfer.entering_node,
            }
            for transfer in plan.traffic
        ],
        "through_host": plan.through_host,
        "compute": {
            "teacher_flops": plan.compute.teacher_flops,
            "student_flops": plan.compute.student_flops,
        },
        "roofline": {
            "chip": asdict(chip),
            "step_seconds": found.seconds,
            "peak_share": found.peak_share,
            "costs": [{**asdict(cost), "seconds": cost.seconds(chip)} for cost in found.costs],
        },
        "cache": cache_as_dict(plan, chip),
        "advice": None if advised is None else changes(plan, advised),
    }
