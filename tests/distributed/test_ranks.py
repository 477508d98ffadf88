"""Work of rank 0 that the other ranks wait for, and errors that all ranks raise together."""

from __future__ import annotations

import errno
import time

from alignkd.distributed.ranks import Ranks
from alignkd.errors import AlignkdError, CheckpointError, TakenOverError, TrainingError, UserError
from tests.ranks import RankPool


def wait_for_first(ranks: Ranks, error: Exception | None) -> tuple[str, str, bool]:
    """The kind of error raised here, its message or the ranks that worked, and whether this rank waited."""
    done = []

    def work() -> None:
        time.sleep(1)
        done.append(ranks.rank)
        if error is not None:
            raise error

    started = time.monotonic()
    raised, message = "", str(done)
    try:
        ranks.run_on_rank0(work)
        message = str(done)
    except (AlignkdError, KeyError) as caught:
        raised, message = type(caught).__name__, str(caught)
    return raised, message, time.monotonic() - started >= 0.9


def raise_own(ranks: Ranks, errors: list[AlignkdError | None]) -> tuple[str, str]:
    try:
        ranks.raise_together(errors[ranks.rank])
    except AlignkdError as error:
        return type(error).__name__, str(error)


def test_when_several_ranks_fail_all_raise_the_kind_of_the_first(two_ranks: RankPool) -> None:
    """Otherwise they would deadlock in a last save, which a rank that has lost the run does not make."""
    lost, bad, worse = TakenOverError("lost"), UserError("entry 7"), UserError("entry 9")
    assert two_ranks.run(raise_own, [lost, bad]) == [
        ("TakenOverError", "lost"),
        ("TakenOverError", "rank 0: lost"),
    ]
    assert two_ranks.run(raise_own, [worse, bad]) == [("UserError", "entry 9"), ("UserError", "entry 7")]
    assert two_ranks.run(raise_own, [None, bad]) == [
        ("UserError", "rank 1: entry 7"),
        ("UserError", "entry 7"),
    ]


def test_the_others_wait_for_rank_0_and_raise_what_it_raises(two_ranks: RankPool) -> None:
    assert two_ranks.run(wait_for_first, None) == [("", "[0]", True), ("", "[]", True)]
    for kind in (CheckpointError, TrainingError):
        name = kind.__name__
        assert two_ranks.run(wait_for_first, kind("no room: step-4")) == [
            (name, "no room: step-4", True),
            (name, "rank 0: no room: step-4", True),
        ]


def test_file_system_errors_and_bugs_of_rank_0_reach_the_others_too(two_ranks: RankPool) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "student")
    assert two_ranks.run(wait_for_first, full) == [
        ("FileSystemError", str(full), True),
        ("FileSystemError", f"rank 0: {full}", True),
    ]
    assert two_ranks.run(wait_for_first, KeyError("lost")) == [
        ("KeyError", "'lost'", True),  # with its traceback, in rank 0's log
        ("TrainingError", "rank 0 failed: KeyError: 'lost'", True),
    ]
