"""When evaluations are due, what they said, and which checkpoint is the best by them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from alignkd.checkpoint.save import CheckpointSaver
from alignkd.engine.accuracy import task_accuracy
from alignkd.engine.held_out import held_out_losses
from alignkd.engine.signals import StopRequest
from alignkd.engine.state import TrainingState
from alignkd.run_folder.best import ACCURACY, EVALUATED_ON, EVALUATION, Best, best_checkpoint, is_better

log = logging.getLogger(__name__)
_TITLES = {"loss": "held-out loss", "ce": "held-out ce", ACCURACY: ACCURACY}


class Evaluations:
    """``evaluation`` of one run in one process; the same on all ranks."""

    def __init__(self, state: TrainingState, stop: StopRequest, report: Callable[..., None]) -> None:
        """``report`` is told of the phase, as often as something moves. Collective. Raises FileSystemError on
        all ranks when a checkpoint cannot be read."""
        self._state, self._stop, self._report = state, stop, report
        self._section = state.config.evaluation
        self._evaluated_on = _evaluated_on(state)
        self._last: tuple[int, dict[str, float]] | None = None
        self._failed_saves = 0
        self._best = self._best_committed() if self._evaluated_on else None

    def _best_committed(self) -> Best | None:
        """Of checkpoints, not of rows: a best step that was never saved is evaluated again. Collective."""
        state, found = self._state, list[Best | None]()
        state.ranks.run_on_rank0(
            lambda: found.append(best_checkpoint(state.run, self._section.best, self._evaluated_on))
        )
        best: Best | None = state.ranks.broadcast_object(found[0] if found else None)
        return best

    @property
    def best_step(self) -> int | None:
        return None if self._best is None else self._best.step

    def is_due(self, step: int) -> bool:
        return self._section.every is not None and step % self._section.every == 0

    def evaluate(self, step: int, saver: CheckpointSaver) -> dict[str, Any]:
        """Columns of the row of ``step``; only the seconds where the evaluation was given up. Collective."""
        started = time.monotonic()
        self._forget_lost_saves(saver)
        values = self._values(step, saver)
        seconds = time.monotonic() - started
        if values:
            self._last = step, values
        by, value = self._section.best, values.get(self._section.best)
        if is_best := is_better(value, by, self._best):
            self._best = Best(step, value, by)
        names = [name for name in dict.fromkeys((by, ACCURACY)) if name in values]
        shown = [f"{_TITLES[name]} {values[name]:.4g}" for name in names]
        if shown:
            log.info("after step %d: %s%s", step, ", ".join(shown), ", the best so far" if is_best else "")
        return {"evaluation_seconds": seconds} | {
            f"evaluation_{name}": value for name, value in values.items()
        }

    def _values(self, step: int, saver: CheckpointSaver) -> dict[str, float]:
        """By the names of metrics rows, without what could not be measured."""
        state, values = self._state, dict[str, float]()

        def alive(done: int) -> None:
            self._report("evaluating", done=done)

        if state.held_out is not None:
            values |= held_out_losses(state, state.held_out, self._stop, alive) or {}
        if state.task is not None:
            student = state.engine.module.student
            found = task_accuracy(
                state.run,
                step,
                student,
                state.task,
                state.ranks,
                self._stop,
                alive,
                saver.require_writer,
            )
            values |= found or {}
        return values

    def _forget_lost_saves(self, saver: CheckpointSaver) -> None:
        """Later values compare with the best that is there, not with one whose save failed. Collective."""
        if saver.totals.failed != self._failed_saves:
            self._report("saving")
            saver.finish()  # the one in flight may be the best
            self._failed_saves = saver.totals.failed
            self._best = self._best_committed()

    def facts(self, step: int) -> dict[str, Any]:
        """For the manifest of the checkpoint of ``step``."""
        if self._last is None or self._last[0] != step:
            return {}
        return {EVALUATION: self._last[1], EVALUATED_ON: self._evaluated_on}


# No value on held-out data depends on these: all have the configured weights, so that they can be compared.
_SAME_VALUES = {"share_vision_tower", "balance", "balance_every"}


def _evaluated_on(state: TrainingState) -> dict[str, Any]:
    """Empty where nothing is evaluated."""
    found: dict[str, Any] = {}
    if state.held_out is not None:
        loss = state.config.distillation.model_dump(mode="json", exclude=_SAME_VALUES)
        found |= {
            "data": state.held_out.fingerprint,
            "samples": state.held_out.samples,
            "loss": {**loss, "teacher": state.identity.teacher},
        }
    if state.task is not None:
        found[ACCURACY] = state.task.asked.identity()
    return found
