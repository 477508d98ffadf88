"""A whole step, forward and backward, keeps all tensors on the accelerator and never asks it for a value."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.fake_accelerator import FAULTS, SCENARIOS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def problems() -> dict[str, str | None]:
    """In a process of its own, because the name of a device stays registered."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.fake_accelerator"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_step_stays_on_the_accelerator_and_asks_for_no_value(
    problems: dict[str, str | None], scenario: str
) -> None:
    assert problems[scenario] is None, problems[scenario]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(problems: dict[str, str | None], fault: str) -> None:
    assert problems[f"fault: {fault}"]
