"""Optimizer steps that DeepSpeed leaves out because a gradient overflowed: counted, and not for ever."""

from __future__ import annotations

from alignkd.errors import TrainingError


class SkippedSteps:
    def __init__(self, most_in_a_row: int, before: int = 0) -> None:
        """``before``: those before the checkpoint that was resumed from."""
        self._most_in_a_row = most_in_a_row
        self._in_a_row = 0
        self.total = before

    def count(self, applied: bool, step: int) -> None:
        """Raises TrainingError after too many in a row. DeepSpeed decides on all ranks alike."""
        self._in_a_row = 0 if applied else self._in_a_row + 1
        self.total += not applied
        if self._in_a_row >= self._most_in_a_row:
            raise TrainingError(
                f"step {step}: {self._in_a_row} optimizer steps in a row were skipped, because gradients "
                "overflowed (training.max_skipped_steps); lower training.learning_rate, or use bf16"
            )
