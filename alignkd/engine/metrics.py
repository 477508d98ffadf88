"""The metrics row of each optimizer step, summed on the device and read one step late.

Reading the step just launched would make the host wait for it. (DeepSpeed's overflow check waits once per
step; nothing here adds to that.) So the row of step s is completed while step s + 1 runs, and
:meth:`Metrics.flush` completes the last one before a save or the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from alignkd.config.schema import DistillationSection
from alignkd.engine.optimizer_step import StepInfo, StepSums, peak_memory_bytes, term_weights
from alignkd.engine.step_clock import StepTime
from alignkd.engine.stopwatch import Reading
from alignkd.errors import TrainingError
from alignkd.losses.total import TERMS, means, total
from alignkd.run_folder.metrics import MetricsFile


@dataclass(frozen=True)
class _Pending:
    row: dict[str, Any]  # what the host knew at once
    info: StepInfo
    values: torch.Tensor  # sums of the terms, and the gradient norm where the device has it, being copied
    host_norm: float | None  # where the host had the gradient norm, or there is none (NaN)
    copied: Any  # device event that follows the copy; None on the CPU
    parts: Mapping[str, Reading]
    time: StepTime
    norm_must_be_finite: bool


def term_columns(values: Mapping[str, float], distillation: DistillationSection) -> dict[str, float]:
    """Columns of a row from the means of all ``TERMS``. The loss has the configured weights also where
    those in use move, so that its values can be compared."""
    return {
        "loss": total(values, term_weights(distillation)),
        "ce": values["ce"],
        distillation.divergence: values["divergence"],
        **{name: values[name] for name in ("attention", "vision_all", "vision_focus")},
        "vision": values["vision_all"] + distillation.vision_focus_weight * values["vision_focus"],
    }


class Metrics:
    """Rows are made on every rank, from the same sums, so a loss that is not finite stops all ranks at the
    same step. Rank 0 has the ``file`` to write them to."""

    def __init__(self, file: MetricsFile | None, distillation: DistillationSection) -> None:
        self._file = file
        self._distillation = distillation
        self._pending: _Pending | None = None
        self.last: dict[str, Any] | None = None

    def add(
        self,
        row: dict[str, Any],
        sums: StepSums,
        info: StepInfo,
        parts: Mapping[str, Reading],
        time: StepTime,
        *,
        applied: bool,
    ) -> None:
        """Take the values of step s and complete the row of step s - 1. Collective.

        ``row`` is what the host knows of the step, ``parts`` the times of its parts by name; ``applied`` is
        false when DeepSpeed skipped it because of an overflow.
        """
        dist.all_reduce(sums.terms)
        values, norm, host_norm = sums.terms, sums.gradient_norm, None
        if isinstance(norm, torch.Tensor) and norm.device == values.device:
            values = torch.cat([values, norm.to(values.dtype).reshape(1)])
        else:  # a copy to the device would wait for it
            host_norm = math.nan if norm is None else float(norm)
        copied = None
        if values.device.type != "cpu":
            values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            copied = get_accelerator().Event()
            copied.record()
        self.flush()
        must_be_finite = applied and sums.gradient_norm is not None
        self._pending = _Pending(row, info, values, host_norm, copied, parts, time, must_be_finite)

    def annotate(self, columns: Mapping[str, float]) -> None:
        """Add columns to the row of the step just taken, which is not complete yet."""
        assert self._pending is not None, "a step was taken"
        self._pending.row.update(columns)

    def flush(self) -> None:
        """Complete the pending row, if there is one. Raises TrainingError when its loss is not finite."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        if pending.copied is not None:
            pending.copied.synchronize()
        self.last = self._complete(pending)
        if self._file is not None:
            self._file.append(self.last)
        bad_norm = pending.norm_must_be_finite and not math.isfinite(self.last["gradient_norm"])
        if bad_norm or not math.isfinite(self.last["loss"]):
            self._raise_not_finite("gradient" if bad_norm else "loss", self.last)

    def sync(self) -> None:
        """Put the completed rows on the disk (on rank 0). Raises OSError."""
        if self._file is not None:
            self._file.sync()

    def _complete(self, pending: _Pending) -> dict[str, Any]:
        *sums, gradient_norm = pending.values.tolist() + (
            [] if pending.host_norm is None else [pending.host_norm]
        )
        elements, counts = pending.info.elements, pending.info.counts
        values = means(dict(zip(TERMS, sums, strict=True)), elements)
        seconds = max(pending.time.seconds, 1e-9)
        return {
            **pending.row,
            "data_wait_share": pending.time.data_wait_share,
            **term_columns(values, self._distillation),
            "gradient_norm": gradient_norm,
            "tokens_per_second": counts.tokens / seconds,
            "samples_per_second": counts.samples / seconds,
            "step_seconds": pending.time.seconds,
            **{
                f"{name}_seconds_share": min(reading.seconds() / seconds, 1.0)
                for name, reading in pending.parts.items()
            },
            "memory_bytes": peak_memory_bytes(),
            "skipped_samples": counts.skipped,
            "padding_share": 1 - counts.tokens / max(counts.slots, 1),
        }

    def _raise_not_finite(self, what: str, row: dict[str, Any]) -> NoReturn:
        names = ("loss", "ce", self._distillation.divergence, "attention", "vision", "gradient_norm")
        shown = {name: row[name] for name in names}
        raise TrainingError(
            f"step {row['step']}: the {what} is not finite: {shown}. Lower training.learning_rate, "
            "or look at the data of this step with `alignkd probe`; the checkpoints before it are kept."
        )
