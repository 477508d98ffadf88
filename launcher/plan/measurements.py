"""What measuring the gradient of each loss term costs, for ``distillation.balance`` = gradient or
``logging.gradient_norms_every``."""

from __future__ import annotations

from alignkd.config import Config
from launcher.plan.compute import Compute


def follows_gradients(config: Config) -> bool:
    return config.distillation.enabled and config.distillation.balance == "gradient"


def measures_gradients(config: Config) -> bool:
    """Then a rank holds the gradients of a term whole, and ZeRO stage 3 is refused."""
    return follows_gradients(config) or config.logging.gradient_norms_every is not None


def measured_flops(config: Config, compute: Compute) -> float:
    """Operations (FLOP) of one measurement on a rank: a forward of the teacher, and for each term with
    a weight a forward and a backward of the student, all of one micro-batch."""
    distillation, weights = config.distillation, config.distillation.weights
    focus = weights.vision * distillation.vision_focus_weight
    terms = 1 + sum(weight > 0 for weight in (weights.logits, weights.attention, weights.vision, focus))
    return (compute.teacher_flops + terms * compute.student_flops) / compute.micro_batches


def measurement_line(config: Config, compute: Compute) -> str | None:
    """None where the weights do not follow the gradients."""
    if not follows_gradients(config):
        return None
    flops, every = measured_flops(config, compute), config.distillation.balance_every
    interval = "step" if every == 1 else f"{every} steps"
    return (
        f"distillation.balance = gradient measures every {interval}: {flops / 1e12:,.1f} TFLOP "
        f"per rank, on average {flops / (every * compute.flops):.1%} of a step."
    )
