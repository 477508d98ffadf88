"""Ranks that wait for rank 0 without a collective."""

from __future__ import annotations

import time

from alignkd.engine.ranks import Ranks
from alignkd.errors import AlignkdError, CheckpointError, TrainingError
from tests.ranks import RankPool


def wait_for_first(ranks: Ranks, error: type[AlignkdError] | None) -> tuple[str, str, bool]:
    done = []

    def work() -> None:
        time.sleep(1)
        done.append(ranks.rank)
        if error is not None:
            raise error("no room: step-4")

    started = time.monotonic()
    try:
        ranks.while_first_works(work)
    except AlignkdError as raised:
        return type(raised).__name__, str(raised), time.monotonic() - started >= 0.9
    return "", str(done), time.monotonic() - started >= 0.9


def test_all_ranks_wait_and_hear_how_it_ended(two_ranks: RankPool) -> None:
    assert two_ranks.run(wait_for_first, None) == [("", "[0]", True), ("", "[]", True)]
    for error in (CheckpointError, TrainingError):
        answer = (error.__name__, "no room: step-4", True)
        assert two_ranks.run(wait_for_first, error) == [answer, answer]
