"""One rank is stopped at each place where a run spends its time; the short version of ``make hangs``."""

from __future__ import annotations

import io
import platform
import sys
from pathlib import Path

import pytest
from rich.console import Console

from alignkd.errors import EXIT_HUNG
from alignkd.run_folder.paths import RunPaths
from launcher.backends.local import run_local
from launcher.commands.status import current_state
from launcher.run.attempts import read_history
from launcher.run.logs import first_error
from launcher.run.manifest import read_manifest
from tests.chaos.__main__ import launch, write_configuration
from tests.hangs.stopping import PLACES

HANG_SECONDS = 10
STEPS = 4


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two ranks that saves after step 2."""
    write_configuration(tmp_path, STEPS)
    return launch(tmp_path, "run", "--dry-run", "--set", f"training.hang_seconds={HANG_SECONDS}")


@pytest.mark.parametrize("where", PLACES)
def test_the_rank_that_was_stopped_is_named_and_the_attempt_is_ended(
    run: Path, where: str, capfd: pytest.CaptureFixture[str]
) -> None:
    step = {"rendezvous": 1, "loader": 2, "step": 2, "save": 2}[where]
    program = [sys.executable, "-m", "tests.hangs.stopping", str(run), where, "1", str(step)]
    code = run_local(run, read_manifest(run), Console(file=io.StringIO()), program)
    assert code == EXIT_HUNG
    (attempt,) = read_history(run)
    assert (attempt.reason, attempt.failed_rank, attempt.bad_nodes) == ("hung", 1, (platform.node(),))
    said = capfd.readouterr().err
    assert f"rank 1 on {platform.node()} is behind" in said
    assert "no stacks of rank 1:" in said
    # The rank that waits for it says where; the stopped one says whose fault it is.
    waiting = RunPaths(run).log(0).read_text()
    assert "most recent call first" in waiting
    frame = {"rendezvous": "rendezvous.py", "loader": "all_reduce_step_info", "save": "save.py"}.get(where)
    assert frame is None or frame in waiting
    error = first_error(run, None)
    assert error is not None
    assert "is behind" in error.lines[0]
    assert current_state(run).state == "failed"
