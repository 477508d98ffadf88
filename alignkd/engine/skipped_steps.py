"""Optimizer steps that DeepSpeed skips because a gradient overflowed: counted, and limited in a row."""

from __future__ import annotations

from alignkd.errors import TrainingError


class SkippedSteps:
    def __init__(self, max_in_a_row: int, before: int = 0) -> None:
        """``before``: those up to the checkpoint that the run resumed from."""
        self._max_in_a_row = max_in_a_row
        self._in_a_row = 0
        self.total = before

    def count(self, applied: bool) -> None:
        self._in_a_row = 0 if applied else self._in_a_row + 1
        self.total += not applied

    def check(self, step: int) -> None:
        """Raises TrainingError after too many in a row, on all ranks: DeepSpeed skips on all or none."""
        if self._in_a_row >= self._max_in_a_row:
            raise TrainingError(
                f"step {step}: {self._in_a_row} optimizer steps in a row were skipped, because gradients "
                "overflowed (training.max_skipped_steps); lower training.learning_rate, or use bf16"
            )
