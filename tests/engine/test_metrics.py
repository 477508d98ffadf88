from __future__ import annotations

import math
from typing import Any

import torch

from alignkd.config.schema import DistillationSection
from alignkd.data.batch import TermCounts
from alignkd.distributed.ranks import Ranks
from alignkd.engine.metrics import Metrics
from alignkd.engine.optimizer_step import StepInfo, StepSums
from alignkd.engine.step_clock import StepTime
from alignkd.engine.stopwatch import Reading
from alignkd.errors import TrainingError
from alignkd.losses.total import TERMS
from tests.ranks import RankPool

PARTS = {"teacher": Reading(0.5, []), "optimizer": Reading(3.0, [])}


def norms_in_rows(_ranks: Ranks, norms: list[Any]) -> list[float]:
    metrics = Metrics(None, DistillationSection())
    elements = dict.fromkeys(TERMS, 1)
    info = StepInfo(TermCounts(samples=1), elements, usr1=False, term=False)
    found = []
    for step, norm in enumerate(norms, start=1):
        sums = StepSums(torch.ones(len(TERMS)), norm)
        metrics.add({"step": step}, sums, info, PARTS, StepTime(2.0, 0.5), applied=True)
        metrics.flush()
        assert metrics.last is not None
        assert metrics.last["ce"] == metrics.last["vision_focus"] == 1.0
        times = [metrics.last[name] for name in ("step_seconds", "data_wait_share", "samples_per_second")]
        assert times == [2.0, 0.5, 0.5]
        shares = [metrics.last[f"{part}_seconds_share"] for part in PARTS]
        assert shares == [0.25, 1.0]  # never more than the step
        found.append(metrics.last["gradient_norm"])
    return found


def test_the_gradient_norm_may_be_on_the_device_on_the_host_or_missing(one_rank: RankPool) -> None:
    (found,) = one_rank.run(norms_in_rows, [torch.tensor(3.0), 2.0, torch.tensor([4.0]), None])
    assert found[:3] == [3.0, 2.0, 4.0]
    assert math.isnan(found[3])


def errors_of_an_infinite_norm(_ranks: Ranks) -> list[str]:
    info = StepInfo(TermCounts(samples=1), dict.fromkeys(TERMS, 1), usr1=False, term=False)
    found = []
    for applied in (True, False):
        metrics = Metrics(None, DistillationSection())
        sums = StepSums(torch.ones(len(TERMS)), math.inf)
        metrics.add({"step": 7}, sums, info, PARTS, StepTime(1.0, 0.0), applied=applied)
        try:
            metrics.flush()
            found.append("")
        except TrainingError as error:
            found.append(str(error))
    return found


def test_an_infinite_gradient_stops_the_run_unless_its_step_was_skipped(one_rank: RankPool) -> None:
    ((applied, skipped),) = one_rank.run(errors_of_an_infinite_norm)
    assert "step 7: the gradient is not finite" in applied
    assert skipped == ""
