"""How two workers share the tests, with pretended workers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from tests.conftest import pytest_xdist_make_scheduler
from tests.parallel import LONGEST_FIRST, SLURM, place, unit

ROOT = Path(__file__).parents[1]
TESTS = [
    "tests/slurm/test_a.py::test_one",
    "tests/slurm/test_b.py::test_two[a::b]",
    *(f"tests/x/test_c.py::test_{number}" for number in range(4)),
    "tests/x/test_d.py::test_four",
]


class Worker:
    """Keeps the tests that the scheduler gives it; none of them ends."""

    def __init__(self, name: str) -> None:
        self.gateway, self.shutting_down = SimpleNamespace(id=name), False
        self.given: list[str] = []

    def send_runtest_some(self, indices: list[int]) -> None:
        self.given += [TESTS[index] for index in indices]

    def shutdown(self) -> None:
        self.shutting_down = True


def test_a_module_and_the_tests_of_slurm_stay_in_one_worker_and_keep_their_order() -> None:
    option = SimpleNamespace(loadscopereorder=True)
    config = SimpleNamespace(option=option, getvalue=lambda _name: ["popen", "popen"])
    scheduler = pytest_xdist_make_scheduler(config, None)
    workers = [Worker("one"), Worker("two")]
    for worker in workers:
        scheduler.add_node(worker)
        scheduler.add_node_collection(worker, TESTS)
    scheduler.schedule()
    # Two tests do not keep the first worker busy, so it is given the next module, too.
    assert [worker.given for worker in workers] == [[*TESTS[:2], TESTS[6]], TESTS[2:6]]


def test_all_tests_of_slurm_are_one_unit_and_otherwise_a_module_is() -> None:
    assert unit("tests/slurm/test_a.py::test_x") == unit("tests/slurm/test_b.py::test_y[1::2]") == SLURM
    assert unit("tests/x/test_c.py::TestY::test_z[a::b]") == "tests/x/test_c.py"


def test_slurm_comes_first_and_whatever_the_queue_names_exists() -> None:
    assert place("tests/slurm/test_a.py::test_x") == 0
    assert place("tests/losses/test_a.py::test_x") == len(LONGEST_FIRST)
    for path in LONGEST_FIRST:
        assert (ROOT / path).exists(), path
