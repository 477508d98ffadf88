"""Training on CPUs must not compile anything: a cluster node may have no compiler. Nor get ready to."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from launcher.backends.ranks import free_port, rank_environments, start_ranks
from tests import tiny

# `python -m alignkd.train RUN`, which says in the end what became of the garbage collector.
PROGRAM = """
import gc, sys
from alignkd.train import main
code = main(sys.argv[1:])
print("collects:", gc.isenabled(), "left alone:", gc.get_freeze_count() > 100_000)
sys.exit(code)
"""


@pytest.mark.parametrize(
    "changes", [{"training__precision": "bf16"}, {"student__offload": True}], ids=["bf16", "offload"]
)
def test_two_ranks_train_with_an_empty_path(tmp_path: Path, changes: dict[str, object]) -> None:
    run = tiny.write_run(tmp_path / "run", 2, student__zero_stage=2, training__max_steps=1, **changes)
    extensions = tmp_path / "extensions"
    extensions.mkdir()
    # An operator that was compiled earlier on this machine must not be found either.
    base = {**os.environ, "PATH": "", "TORCH_EXTENSIONS_DIR": str(extensions), "PYTHONPROFILEIMPORTTIME": "1"}
    environments = rank_environments(1, 2, free_port(), "cpu", [], base)
    group = start_ranks([sys.executable, "-c", PROGRAM, str(run)], environments, run / "logs")
    try:
        for _ in range(2):
            assert group.next_exit(300) is not None, "a rank hangs"
    finally:
        group.kill()
    log = (run / "logs" / "rank-0.log").read_text()
    assert group.codes == {0: 0, 1: 0}, log
    assert json.loads((run / "result.json").read_text())["step"] == 1
    assert list(extensions.iterdir()) == []
    imported = {line.rpartition("|")[2].strip() for line in log.splitlines() if "import time:" in line}
    assert "alignkd.engine.trainer" in imported
    assert "torch._inductor.compile_fx" not in imported  # a second of every rank's start
    assert "collects: True left alone: True" in log
