"""Optimizer steps that DeepSpeed skips because a gradient overflowed: counted, and limited in a row."""

from __future__ import annotations

from alignkd.engine.state import TrainingState
from alignkd.errors import TrainingError
from alignkd.run_folder.checkpoints import read_manifest, step_folder

IN_A_ROW = "skipped_in_a_row"  # key of a checkpoint's manifest


class SkippedSteps:
    def __init__(self, max_in_a_row: int, before: int = 0, in_a_row: int = 0) -> None:
        """``before``: those up to the checkpoint that the run resumed from, the last ``in_a_row`` of them
        without an applied step since."""
        self._max_in_a_row = max_in_a_row
        self.in_a_row = in_a_row
        self.total = before

    @classmethod
    def of_run(cls, state: TrainingState) -> SkippedSteps:
        """As they were in the checkpoint that was loaded."""
        step = state.found.step
        # Earlier versions did not record the streak.
        in_a_row = 0 if step is None else read_manifest(step_folder(state.run, step)).get(IN_A_ROW, 0)
        return cls(state.config.training.max_skipped_steps, int(state.engine.skipped_steps), in_a_row)

    def facts(self) -> dict[str, int]:
        """For a checkpoint's manifest."""
        return {IN_A_ROW: self.in_a_row}

    def count(self, applied: bool) -> None:
        self.in_a_row = 0 if applied else self.in_a_row + 1
        self.total += not applied

    def check(self, step: int) -> None:
        """Raises TrainingError after too many in a row, on all ranks: DeepSpeed skips on all or none."""
        if self.in_a_row >= self._max_in_a_row:
            raise TrainingError(
                f"step {step}: {self.in_a_row} optimizer steps in a row were skipped, because gradients "
                "overflowed (training.max_skipped_steps); lower training.learning_rate, or use bf16"
            )
