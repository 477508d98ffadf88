"""What must fit together before a run starts: models, ranks, batch sizes, and precisions of the device."""

from __future__ import annotations

from deepspeed.accelerator import get_accelerator

from alignkd.config.schema import Config
from alignkd.errors import UserError
from alignkd.models.agreement import check_agreement, check_templates


def check_run(config: Config, world_size: int, accumulation: int) -> None:
    """Raises UserError."""
    _check_batch_size(config, world_size, accumulation)
    _check_precision(config)
    problems = check_agreement(config.model, config.distillation.top_k if config.distillation.enabled else 1)
    if problems := problems or check_templates(config):
        raise UserError("; ".join(problems))


def _check_batch_size(config: Config, world_size: int, accumulation: int) -> None:
    training = config.training
    whole, at_once = training.global_batch_size, training.micro_batch_size * world_size
    if training.tokens_per_micro_batch is not None:
        fits = accumulation == -(-whole // at_once)  # need not divide: the budget splits each step anew
    else:
        fits = accumulation * at_once == whole
    if not fits:
        raise UserError(
            f"training.global_batch_size {training.global_batch_size} is not micro_batch_size "
            f"{training.micro_batch_size} x {world_size} ranks x {accumulation} accumulation steps of "
            "ds/student.json; the run folder was made for another number of ranks"
        )


def _check_precision(config: Config) -> None:
    accelerator = get_accelerator()
    for key, precision in (
        ("training.precision", config.training.precision),
        ("teacher.precision", config.teacher.precision),
    ):
        if precision == "fp16" and not accelerator.is_fp16_supported():
            raise UserError(
                f"{key}: fp16 is not supported on {accelerator.device_name()}; valid here: bf16, fp32"
            )
