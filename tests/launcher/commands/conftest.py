from __future__ import annotations

from pathlib import Path

import pytest

from alignkd.run_folder.atomic_files import write_json
from launcher.backends.base import Started
from launcher.backends.slurm import backend as slurm


@pytest.fixture
def slurm_run(make_run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of the Slurm back end, seen from the shell of allocation 8. Nothing is queued, every job that is
    asked for is running, and a start does nothing but return 0."""
    folder, manifest = make_run()
    write_json(folder / "manifest.json", {**manifest.as_dict(), "backend": "slurm"})
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    monkeypatch.setattr(slurm, "own_jobs", list)
    monkeypatch.setattr(slurm, "running_jobs", set)
    monkeypatch.setattr(slurm.SlurmBackend, "start", lambda *_: Started(0, None))
    return folder
