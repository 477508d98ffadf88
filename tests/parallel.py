"""How ``pytest -n 2`` shares the tests: each module, with its fixtures, runs in one of the workers.

A worker that runs out of tests takes the next module of the queue. The longest modules stand first, so that
none of them runs alone at the end.
"""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

SLURM = "tests/slurm/"  # one worker runs the whole folder: it starts one Slurm
LONGEST_FIRST = (
    SLURM,
    "tests/test_families_end_to_end.py",
    "tests/test_end_to_end.py",
    "tests/checkpoint/",
    "tests/engine/",
    "tests/teacher/",
    "tests/evaluate/",
    "tests/launcher/",
)


def place(test: str) -> int:
    """The place of a test (its node id) in the queue: a lower one runs earlier."""
    return next((n for n, prefix in enumerate(LONGEST_FIRST) if test.startswith(prefix)), len(LONGEST_FIRST))


def unit(test: str) -> str:
    """What a worker takes as a whole: the test's module, or all tests of Slurm."""
    return SLURM if test.startswith(SLURM) else test.partition("::")[0]


class ModuleScheduling(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return unit(nodeid)
