from __future__ import annotations

import pytest

from alignkd.engine.skipped_steps import SkippedSteps
from alignkd.errors import TrainingError


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
