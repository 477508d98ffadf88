"""Parameter groups, AdamW, and a learning rate that is a pure function of the optimizer step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from alignkd.config.schema import TrainingSection
from alignkd.engine.student_step import StudentStep

RATE_NAMES = ("learning_rate", "projector_learning_rate", "adapter_learning_rate")


def base_rates(training: TrainingSection) -> dict[str, float]:
    """Peak learning rates; the projector follows the base, the adapters follow the projector."""
    projector = training.projector_learning_rate or training.learning_rate
    adapter = training.adapter_learning_rate or projector
    return dict(zip(RATE_NAMES, (training.learning_rate, projector, adapter), strict=True))


def schedule_factor(step: int, total_steps: int, warmup_ratio: float) -> float:
    """Linear warm-up over ceil(ratio x total) steps, then half a cosine down to 0. ``step`` counts from 0."""
    warmup = math.ceil(total_steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(total_steps - warmup, 1)))


def parameter_groups(module: StudentStep, training: TrainingSection) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate and weight decay (none on vectors, none on the adapters).

    Every group carries ``rate_name``, one of :data:`RATE_NAMES`, and ``base_rate``, the peak that
    :func:`set_learning_rates` scales. A checkpoint saves both with the group; a resume puts them back as the
    configuration has them now (``checkpoint.resume.CONFIGURED``).
    """
    rates = base_rates(training)
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        rate_name = RATE_NAMES[0]
        if name.startswith("adapters."):
            rate_name = RATE_NAMES[2]
        elif name.startswith("student.") and module.student.is_projector(name.removeprefix("student.")):
            rate_name = RATE_NAMES[1]
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        decays = dimensions > 1 and rate_name != RATE_NAMES[2]
        groups.setdefault((rate_name, training.weight_decay if decays else 0.0), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": decay,
            "lr": rates[rate_name],
            "base_rate": rates[rate_name],
            "rate_name": rate_name,
        }
        for (rate_name, decay), parameters in groups.items()
    ]


def describe_groups(module: StudentStep, training: TrainingSection) -> list[list[list[Any]]]:
    """[name, shape] of every parameter, in the order in which the optimizer has them, by group."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [
        [[names[id(one)], list(getattr(one, "ds_shape", one.shape))] for one in group["params"]]
        for group in parameter_groups(module, training)
    ]


def build_optimizer(groups: list[dict[str, Any]], device: torch.device) -> torch.optim.AdamW:
    """AdamW with one kernel per group where torch has it, also on the CPU, which updates offloaded states."""
    fused = device.type in ("cuda", "xpu", "hpu", "cpu")
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=fused)


def set_learning_rates(optimizer: Any, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_rate"] * factor


def learning_rates(optimizer: Any) -> dict[str, float]:
    """Current rate by name, as the optimizer has it. 0 for a part that is not trained."""
    return dict.fromkeys(RATE_NAMES, 0.0) | {
        group["rate_name"]: group["lr"] for group in optimizer.param_groups
    }
