from __future__ import annotations

import pytest

from alignkd.engine.step_clock import StepClock, StepTime


class Now:
    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds

    def passes(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def now() -> Now:
    return Now()


def test_a_step_lasts_from_the_end_of_the_one_before_and_includes_its_wait_for_data(now: Now) -> None:
    clock = StepClock(now)
    with clock.data_wait():
        now.passes(1.0)
    now.passes(3.0)
    assert clock.end_step() == StepTime(seconds=4.0, data_wait_share=0.25)
    now.passes(0.5)
    with clock.data_wait():
        now.passes(0.5)
    assert clock.end_step() == StepTime(1.0, 0.5)


def test_what_is_paused_belongs_to_no_step(now: Now) -> None:
    clock = StepClock(now)
    with clock.data_wait():
        now.passes(1.0)
    with clock.paused():
        now.passes(50.0)
    now.passes(1.0)
    assert clock.end_step() == StepTime(2.0, 0.5)
    with clock.paused():
        now.passes(50.0)
    now.passes(3.0)
    assert clock.end_step().seconds == 3.0


def test_the_slowest_step_is_that_since_it_was_last_taken(now: Now) -> None:
    clock = StepClock(now)
    for seconds in (1.0, 7.0, 2.0):
        now.passes(seconds)
        clock.end_step()
    assert clock.take_slowest() == 7.0
    assert clock.take_slowest() == 0.0
    now.passes(2.0)
    clock.end_step()
    assert clock.take_slowest() == 2.0
