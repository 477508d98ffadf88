"""A stop that was requested before the rank could receive a signal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from launcher.backends.ranks import free_port, rank_environments
from tests import tiny


def test_a_stop_file_counts_as_the_signal_that_it_names(tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run", 1)
    (run / "stop").write_text("TERM 7\n")
    (environment,) = rank_environments(1, 1, free_port(), "cpu", (), os.environ)
    done = subprocess.run(
        [sys.executable, "-m", "alignkd.train", str(run)],
        env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 86, done.stdout + done.stderr
    assert "FutureWarning" not in done.stderr  # from DeepSpeed's calls; they would fill the log
    assert json.loads((run / "result.json").read_text())["status"] == "stopped"
    assert not (run / "metrics.jsonl").exists() or tiny.metrics_rows(run) == []
