"""The short version of ``make chaos``."""

from __future__ import annotations

import subprocess
import sys


def test_a_run_survives_three_kills_without_loss() -> None:
    command = [sys.executable, "-m", "tests.chaos", "--kills", "3", "--seed", "17", "--steps", "12"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| kills | 3 |" in done.stdout
    assert "| committed checkpoints lost | 0 |" in done.stdout
    assert "| metrics rows or weights that differ from the undisturbed run | 0 |" in done.stdout
