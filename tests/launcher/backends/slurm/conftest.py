from __future__ import annotations

from pathlib import Path

import pytest

from launcher.backends.slurm import finish, script
from launcher.backends.slurm.lifecycle import JobState
from launcher.run import attempts


@pytest.fixture
def run(make_run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on two nodes of one rank each, whose first attempt is open, as job 7. Its job is left alone by
    Slurm, no step can be started, and nobody waits."""
    folder: Path = make_run(nodes=2, gpus_per_node=1)[0]
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.delenv("ALIGNKD_RUN", raising=False)
    monkeypatch.setattr(script, "pause", lambda _seconds: None)
    monkeypatch.setattr(finish, "job_state", lambda _job: JobState())
    monkeypatch.setattr(finish, "nodes_that_see", lambda *_: {})
    monkeypatch.setattr(finish, "hostnames", lambda _nodes: ["n1", "n2"])
    attempts.begin(folder, "7", "n[1-2]", None)
    return folder
