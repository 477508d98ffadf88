"""``metrics.jsonl``: one row per optimizer step, collected on the device and read one step late.

Reading the step just launched would make the host wait for it (as DeepSpeed's own overflow check does once
per step; nothing here adds to that). The row of step s is therefore finished while step s + 1 runs;
:meth:`Metrics.flush` finishes the last one before a save or the end.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from alignkd.config.schema import DistillationSection
from alignkd.engine.optimizer_step import StepInfo, StepSums, peak_memory_bytes, term_weights
from alignkd.engine.ranks import Ranks
from alignkd.engine.stopwatch import Reading
from alignkd.errors import TrainingError
from alignkd.losses.total import TERMS, means, total
from alignkd.run_folder.atomic_files import flush_to_disk
from alignkd.run_folder.metrics import cut_rows_after, row_line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pending:
    row: dict[str, Any]  # what the host knew at once
    facts: StepInfo
    values: torch.Tensor  # sums of the terms, and the gradient norm where the device has it, on their way
    host_norm: float | None  # where the host had the gradient norm, or there is none (NaN)
    copied: Any  # device event behind that copy; None on the CPU
    teacher: Reading
    step_seconds: float
    norm_must_be_finite: bool


class Metrics:
    """Rows are made on every rank (all see the same sums), so a bad loss stops all of them at the same step;
    rank 0 writes."""

    def __init__(self, path: Path, distillation: DistillationSection, ranks: Ranks) -> None:
        self._path = path
        self._distillation = distillation
        self._ranks = ranks
        self._pending: _Pending | None = None
        self._unwritten: list[str] = []
        self.last: dict[str, Any] | None = None

    def cut_after(self, step: int) -> None:
        """Drop rows beyond the resumed step: those steps will be made again. Raises OSError."""
        if self._ranks.is_first:
            cut_rows_after(self._path, step)

    def add(
        self,
        row: dict[str, Any],
        sums: StepSums,
        facts: StepInfo,
        teacher: Reading,
        step_seconds: float,
        *,
        applied: bool,
    ) -> None:
        """Hand in step s; the row of step s - 1 is finished. Collective.

        ``applied`` is false when DeepSpeed left the step out because of an overflow.
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
        self._pending = _Pending(row, facts, values, host_norm, copied, teacher, step_seconds, must_be_finite)

    def flush(self) -> None:
        """Finish the row that is waiting. Raises TrainingError when its loss is not finite."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        if pending.copied is not None:
            pending.copied.synchronize()
        self.last = self._finish(pending)
        if self._ranks.is_first:
            self._unwritten.append(row_line(self.last))
            self._write_rows()
        bad_norm = pending.norm_must_be_finite and not math.isfinite(self.last["gradient_norm"])
        if bad_norm or not math.isfinite(self.last["loss"]):
            shown = {
                name: self.last[name]
                for name in (
                    "loss",
                    "ce",
                    self._distillation.divergence,
                    "attention",
                    "vision",
                    "gradient_norm",
                )
            }
            what = "gradient" if bad_norm else "loss"
            raise TrainingError(
                f"step {self.last['step']}: the {what} is not finite: {shown}. Lower training.learning_rate, "
                "or look at the data of this step with `alignkd probe`; the checkpoints before it are kept."
            )

    def sync(self) -> None:
        """All finished rows are on the disk afterwards, so that a checkpoint may count: a resume does not
        make the rows before it again. Raises OSError."""
        if self._ranks.is_first and (self._unwritten or self._path.exists()):
            self._append()
            flush_to_disk(self._path)

    def _write_rows(self) -> None:
        """Rows that a full disk does not take wait for the next time; a save will say what is wrong."""
        try:
            self._append()
        except OSError as error:
            log.warning("%s: %s", self._path, error)

    def _append(self) -> None:
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(self._unwritten))
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self._path, size)  # half a row, which the next would be appended to
            raise
        self._unwritten = []

    def _finish(self, pending: _Pending) -> dict[str, Any]:
        *sums, gradient_norm = pending.values.tolist() + (
            [] if pending.host_norm is None else [pending.host_norm]
        )
        elements, counts = pending.facts.elements, pending.facts.counts
        values = means(dict(zip(TERMS, sums, strict=True)), elements)
        vision = values["vision_all"] + self._distillation.vision_focus_weight * values["vision_focus"]
        terms = {"ce": values["ce"], self._distillation.divergence: values["divergence"]}
        terms |= {name: values[name] for name in ("attention", "vision_all", "vision_focus")}
        seconds = max(pending.step_seconds, 1e-9)
        return {
            **pending.row,
            "loss": total(values, term_weights(self._distillation)),
            **terms,
            "vision": vision,
            "gradient_norm": gradient_norm,
            "tokens_per_second": counts.tokens / seconds,
            "samples_per_second": counts.samples / seconds,
            "step_seconds": pending.step_seconds,
            "teacher_seconds_share": min(pending.teacher.seconds() / seconds, 1.0),
            "memory_bytes": peak_memory_bytes(),
            "skipped_samples": counts.skipped,
            "padding_share": 1 - counts.tokens / max(counts.slots, 1),
        }
