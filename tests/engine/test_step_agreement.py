"""What the ranks agree on before each step: counts, signals, writers, and problems."""

from __future__ import annotations

from typing import Any

from alignkd.distributed.ranks import Ranks
from alignkd.engine.optimizer_step import StepInfo, all_reduce_step_info
from alignkd.engine.signals import StopRequest
from alignkd.errors import UserError
from alignkd.losses.total import ElementSizes
from tests import tiny
from tests.ranks import RankPool

SIZES = ElementSizes(student_heads=4, student_width=48, vision_tokens=144, top_k=16)


def agree(ranks: Ranks, only: dict[str, Any]) -> StepInfo:
    """``only``: what rank 1 has."""
    stop, own = StopRequest(), only if ranks.rank == 1 else {}
    stop.usr1, stop.term = own.get("usr1", False), own.get("term", False)
    return all_reduce_step_info(
        [tiny.batch_of(*(["text"] * (ranks.rank + 1)))],
        SIZES,
        stop,
        ranks,
        own.get("written", True),
        own.get("problem"),
    )


def test_counts_are_summed_over_the_ranks(two_ranks: RankPool) -> None:
    one, other = two_ranks.run(agree, {})
    assert one == other
    assert one.counts.samples == 3
    assert (one.usr1, one.term, one.written) == (False, False, True)


def test_a_signal_to_one_rank_is_known_to_all(two_ranks: RankPool) -> None:
    assert [(info.usr1, info.term) for info in two_ranks.run(agree, {"usr1": True})] == [(True, False)] * 2
    assert [(info.usr1, info.term) for info in two_ranks.run(agree, {"term": True})] == [(False, True)] * 2


def test_writers_are_idle_only_when_those_of_all_ranks_are(two_ranks: RankPool) -> None:
    assert [info.written for info in two_ranks.run(agree, {"written": False})] == [False, False]


def test_the_problem_of_one_rank_is_the_failure_of_all_of_them(two_ranks: RankPool) -> None:
    for info in two_ranks.run(agree, {"problem": UserError("image 7 is broken")}):
        assert isinstance(info.failure, UserError)
        assert "image 7 is broken" in str(info.failure)
    assert [info.failure for info in two_ranks.run(agree, {})] == [None, None]
