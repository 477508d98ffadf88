"""The watch for hangs, with an injected clock. tests/hangs stops real ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from alignkd.run_folder.heartbeat import Beat
from alignkd.run_folder.paths import RunPaths
from launcher.run.hangs import LONG_PHASES, SLOWEST_STEPS, Hang, HangWatch, read_hang, write_hang

LIMIT = 100.0
TRAINING = Beat("training", 7, steps=3, step_seconds=1.0)


class World:
    """Four ranks on two nodes, and the time."""

    def __init__(
        self,
        run: Path,
        limit: float = LIMIT,
        rendezvous: float = LIMIT / 2,
        nodes: Sequence[str] = ("n1", "n1", "n2", "n2"),
    ) -> None:
        self.time, self.counts = 0.0, 0
        self._run = run
        self.watch = HangWatch(run, 4, nodes, limit, rendezvous, lambda: self.time)

    def beat(self, rank: int, beat: Beat) -> None:
        self.counts += 1
        path = RunPaths(self._run).beat(rank)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(asdict(beat) | {"count": self.counts}))

    def wait(self, seconds: float, *beats: tuple[int, Beat], exited: tuple[int, ...] = ()) -> Hang | None:
        """Time passes, in which these ranks beat and none moves."""
        end = self.time + seconds
        while self.time < end:
            self.time += self.watch.interval
            for rank, beat in beats:
                self.beat(rank, beat)
            if (hang := self.watch.look(exited)) is not None:
                return hang
        return None


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


ALL = [(rank, TRAINING) for rank in range(4)]


def test_a_rank_whose_beats_stop_is_named_with_its_node(world: World) -> None:
    assert world.wait(10, *ALL) is None
    hang = world.wait(2 * LIMIT, *ALL[:2], ALL[3])
    assert hang is not None
    assert (hang.ranks, hang.nodes) == ((2,), ("n2",))
    assert "rank 2 on n2 is behind: step 7, training, without a heartbeat for 1" in hang.message
    assert "rank 0, which waits, is at step 7, training" in hang.message
    assert LIMIT <= world.time <= 10 + LIMIT + 3 * world.watch.interval


def test_a_rank_that_still_beats_is_behind_by_its_step_or_by_its_place_in_it(world: World) -> None:
    waiting = (1, Beat("waiting for data", 7, steps=3, step_seconds=1.0))
    hang = world.wait(2 * LIMIT, ALL[0], waiting, *ALL[2:])
    assert hang is not None
    assert (hang.ranks, hang.nodes) == ((1,), ("n1",))
    assert "rank 1 on n1 is behind: step 7, waiting for data; rank 0, which waits" in hang.message
    assert "heartbeat" not in hang.message


def test_where_the_names_of_the_nodes_are_not_known_none_is_recorded(tmp_path: Path) -> None:
    world = World(tmp_path, nodes=())
    assert world.wait(10, *ALL) is None
    hang = world.wait(2 * LIMIT, *ALL[:2], ALL[3])
    assert hang is not None
    assert (hang.ranks, hang.nodes) == ((2,), ())
    assert "rank 2 is behind: step 7" in hang.message


def test_when_all_ranks_wait_at_the_same_place_no_rank_is_blamed(world: World) -> None:
    hang = world.wait(2 * LIMIT, *ALL)
    assert hang is not None
    assert (hang.ranks, hang.nodes) == ((), ())
    assert "no rank is behind, all are at step 7, training; their stacks say where" in hang.message


def test_a_rank_that_moves_now_and_then_is_not_a_hang(world: World) -> None:
    for step in range(10):
        moved = Beat("training", step, steps=3, step_seconds=1.0, moves=step)
        assert world.wait(0.9 * LIMIT, *((rank, moved) for rank in range(4))) is None


def test_ten_slow_steps_are_granted(world: World) -> None:
    slow = [(rank, Beat("training", 7, steps=3, step_seconds=LIMIT / 5)) for rank in range(4)]
    assert world.wait(1.9 * LIMIT, *slow) is None
    assert world.wait(0.2 * LIMIT, *slow) is not None


@pytest.mark.parametrize(
    "beat",
    [
        Beat("saving", 7, steps=3),
        Beat("converting"),
        Beat("exporting", 9, steps=9),
        Beat("training", 7, steps=0),  # the first step compiles
        Beat("training", 8, steps=1),  # how long a step takes is known from the second one on
    ],
)
def test_long_work_is_not_a_hang_while_all_ranks_beat(world: World, beat: Beat) -> None:
    beats = [(rank, beat) for rank in range(4)]
    assert world.wait((LONG_PHASES - 0.5) * LIMIT, *beats) is None
    assert world.wait(LIMIT, *beats) is not None


def test_a_save_is_granted_as_much_time_as_a_slow_step(world: World) -> None:
    seconds = 2 * LONG_PHASES * LIMIT / SLOWEST_STEPS
    beats = [(rank, replace(TRAINING, phase="saving", step_seconds=seconds)) for rank in range(4)]
    assert world.wait(1.9 * LONG_PHASES * LIMIT, *beats) is None
    assert world.wait(0.2 * LONG_PHASES * LIMIT, *beats) is not None


def test_a_rank_that_is_stopped_in_long_work_is_found_as_soon_as_in_a_step(world: World) -> None:
    saving = [(rank, Beat("saving", 7, steps=3)) for rank in range(4)]
    assert world.wait(10, *saving) is None
    hang = world.wait(1.2 * LIMIT, *saving[1:])
    assert hang is not None
    assert hang.ranks == (0,)


def test_a_rank_that_never_starts_is_named(world: World) -> None:
    joining = [(rank, Beat("joining")) for rank in range(3)]
    hang = world.wait(2 * LIMIT, *joining)
    assert hang is not None
    assert "rank 3 on n2 is behind: it has never started" in hang.message


def test_a_rank_that_has_not_started_is_given_the_time_of_the_rendezvous(tmp_path: Path) -> None:
    world = World(tmp_path, rendezvous=3 * LIMIT)
    joining = [(rank, Beat("joining")) for rank in range(3)]
    assert world.wait(3.4 * LIMIT, *joining) is None
    hang = world.wait(0.2 * LIMIT, *joining)
    assert hang is not None
    assert hang.ranks == (3,)


def test_a_rank_that_stops_in_the_rendezvous_is_found_before_its_end(tmp_path: Path) -> None:
    world = World(tmp_path, rendezvous=3 * LIMIT)
    joining = [(rank, Beat("joining")) for rank in range(4)]
    assert world.wait(10, *joining) is None
    hang = world.wait(1.2 * LIMIT, *joining[1:])
    assert hang is not None
    assert hang.ranks == (0,)


def test_a_file_system_that_does_not_answer_before_all_ranks_have_started_is_no_hang(tmp_path: Path) -> None:
    world = World(tmp_path, rendezvous=3 * LIMIT)
    assert world.wait(10, *((rank, Beat("joining")) for rank in range(3))) is None
    assert world.wait(2 * LIMIT) is None


def test_ranks_whose_process_has_ended_are_not_behind(world: World) -> None:
    """Their beats have stopped, too. One that does not exit is found like any other."""
    world.wait(10, *((rank, Beat("ended", 9, steps=9)) for rank in range(4)))
    hang = world.wait(2 * LIMIT, exited=(0, 1, 2))
    assert hang is not None
    assert hang.ranks == (3,)
    assert "step 9, ended, without a heartbeat" in hang.message


def test_a_rank_that_still_works_while_others_have_ended_is_not_a_hang_at_once(world: World) -> None:
    world.wait(10, *((rank, Beat("ended", 9, steps=9)) for rank in range(3)))
    last = (3, Beat("exporting", 9, steps=9))
    assert world.wait(3 * LIMIT, last, exited=(0, 1, 2)) is None
    hang = world.wait(LONG_PHASES * LIMIT, last, exited=(0, 1, 2))
    assert hang is not None
    assert hang.ranks == (3,)


def test_a_file_system_that_does_not_answer_is_no_hang(world: World) -> None:
    """No rank can write its beats then."""
    world.wait(10, *ALL)
    assert world.wait((LONG_PHASES - 0.5) * LIMIT) is None
    moved = [(rank, Beat("training", 8, steps=4, step_seconds=1.0, moves=9)) for rank in range(4)]
    assert world.wait(LIMIT / 2, *moved) is None


def test_ten_slow_steps_are_granted_while_no_rank_beats(world: World) -> None:
    seconds = 2 * LONG_PHASES * LIMIT / SLOWEST_STEPS
    world.wait(10, *((rank, Beat("training", 7, steps=3, step_seconds=seconds)) for rank in range(4)))
    assert world.wait(1.9 * LONG_PHASES * LIMIT) is None
    assert world.wait(0.2 * LONG_PHASES * LIMIT) is not None


def test_when_no_rank_beats_for_the_longest_limit_the_attempt_ends_and_no_rank_is_blamed(
    world: World,
) -> None:
    world.wait(10, *ALL)
    hang = world.wait((LONG_PHASES + 0.5) * LIMIT)
    assert hang is not None
    assert (hang.ranks, hang.nodes) == ((), ())
    assert "no rank is behind, all are at step 7, training" in hang.message


def test_a_job_that_was_suspended_as_a_whole_is_no_hang(world: World) -> None:
    world.wait(10, *ALL)
    world.time += 100 * LIMIT
    assert world.watch.look() is None
    assert world.wait(LIMIT / 2, *ALL) is None


def test_zero_seconds_switch_the_watch_off(tmp_path: Path) -> None:
    assert World(tmp_path, limit=0).wait(1e4, *ALL) is None


def test_a_hang_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_hang(tmp_path) is None
    (tmp_path / "exits").mkdir()
    hang = Hang((1, 2), ("n1", "n2"), "rank 1 is behind\n  no stacks")
    write_hang(tmp_path, hang)
    assert read_hang(tmp_path) == hang
