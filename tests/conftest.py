"""Shared by all tests: the fixture models and real ranks."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from tests.ranks import RankPool

# Tiny models: threads cost more than they bring, above all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell that starts this in the background ignores SIGINT, and programs that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Indices of test data do not belong into the user's cache.
_cache = tempfile.TemporaryDirectory(prefix="alignkd-cache-")
os.environ["ALIGNKD_CACHE"] = _cache.name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sorted in a worker of ``pytest -n``; a plain ``pytest`` keeps the order of the files."""
    if hasattr(config, "workerinput"):
        from tests.parallel import place

        items.sort(key=lambda item: place(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.parallel import ModuleScheduling

    config.option.loadscopereorder = False  # a long module may have few tests
    return ModuleScheduling(config, log)


def _pool(world_size: int) -> Iterator[RankPool]:
    pool = RankPool(world_size)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def one_rank() -> Iterator[RankPool]:
    yield from _pool(1)


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    yield from _pool(2)


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    yield from _pool(4)
