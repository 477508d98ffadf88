from __future__ import annotations

import pytest

from alignkd.engine.skipped_steps import SkippedSteps
from alignkd.errors import TrainingError


def test_a_resume_goes_on_counting_where_the_checkpoint_was() -> None:
    skipped = SkippedSteps(3, before=7, in_a_row=2)
    skipped.count(False)
    assert (skipped.total, skipped.in_a_row) == (8, 3)
    with pytest.raises(TrainingError, match="3 optimizer steps in a row"):
        skipped.check(9)
    skipped.count(True)
    assert skipped.in_a_row == 0
    skipped.check(10)


def test_only_skipped_steps_in_a_row_stop_the_run() -> None:
    skipped = SkippedSteps(3)
    for step, applied in enumerate([False, False, True, False, False], start=1):
        skipped.count(applied)
        skipped.check(step)
    assert skipped.total == 4
    skipped.count(False)
    assert skipped.total == 5
    with pytest.raises(TrainingError, match="step 6: 3 optimizer steps in a row"):
        skipped.check(6)
