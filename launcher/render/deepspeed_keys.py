"""The keys that a DeepSpeed file of ours may hold: DeepSpeed silently ignores misspelt and dotted keys.

The names are those of DeepSpeed 0.19.8 (``runtime/config.py``, ``runtime/zero/config.py``,
``runtime/precision_config.py``); a test compares them with the installed release.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignkd.errors import UserError

Kind = type | Mapping[str, Any]

_OFFLOAD: dict[str, Kind] = {"device": str, "pin_memory": bool}
_ZERO: dict[str, Kind] = {
    "stage": int,
    "contiguous_gradients": bool,
    "reduce_scatter": bool,
    "reduce_bucket_size": int,
    "allgather_partitions": bool,
    "allgather_bucket_size": int,
    "overlap_comm": bool,
    "memory_efficient_linear": bool,
    "round_robin_gradients": bool,
    "sub_group_size": int,
    "offload_optimizer": {**_OFFLOAD, "ratio": float},
    "offload_param": _OFFLOAD,
    "stage3_prefetch_bucket_size": int,
    "stage3_param_persistence_threshold": int,
    "stage3_model_persistence_threshold": int,
    "stage3_max_live_parameters": int,
    "stage3_max_reuse_distance": int,
    "stage3_module_granularity_threshold": int,
    "stage3_allgather_sequential": bool,
    "stage3_use_all_reduce_for_fetch_params": bool,
}
KNOWN: dict[str, Kind] = {
    "train_batch_size": int,
    "train_micro_batch_size_per_gpu": int,
    "gradient_accumulation_steps": int,
    "gradient_clipping": float,
    "steps_per_print": int,
    "wall_clock_breakdown": bool,
    "timers": {"throughput": {"enabled": bool}},
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
    "bf16": {"enabled": bool, "check_grad_overflow": bool},
    "fp16": {
        "enabled": bool,
        "loss_scale": float,
        "initial_scale_power": int,
        "loss_scale_window": int,
        "hysteresis": int,
        "consecutive_hysteresis": bool,
        "min_loss_scale": int,
    },
    "data_types": {"grad_accum_dtype": str},
    "zero_optimization": _ZERO,
}

_REASONS = {
    "optimizer": "the engine builds the optimizer; set training.learning_rate and the keys next to it",
    "scheduler": "the engine builds the schedule; set training.warmup_ratio",
    "checkpoint": "checkpoints are written by alignkd; some DeepSpeed writers cannot read theirs back",
    "zero_optimization.zero_hpz_partition_size": "it crashes without an optimizer and is untested with one",
}


def check_keys(values: Mapping[str, Any], source: str) -> None:
    """Raise UserError with every key that is unknown, mistyped, or ``auto``."""
    problems = _problems(values, KNOWN, "")
    if problems:
        raise UserError(
            f"{source}: not a usable DeepSpeed file\n" + "\n".join(f"  - {text}" for text in problems)
        )


def _problems(values: Mapping[str, Any], known: Mapping[str, Any], prefix: str) -> list[str]:
    found = []
    for key, value in values.items():
        name, kind = prefix + key, known.get(key)
        if kind is None:
            reason = _REASONS.get(name, f"DeepSpeed would ignore it silently; valid here: {', '.join(known)}")
            found.append(f"{name}: unknown key; {reason}")
        elif value == "auto":
            found.append(f"{name} = auto: would silently become some default; write the value")
        elif isinstance(kind, Mapping):
            if isinstance(value, Mapping):
                found += _problems(value, kind, f"{name}.")
            else:
                found.append(f"{name} = {value!r}: must be a section")
        elif not _fits(value, kind):
            found.append(f"{name} = {value!r}: must be of type {kind.__name__}")
    return found


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)
