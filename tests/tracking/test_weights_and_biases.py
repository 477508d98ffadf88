"""What a run tells Weights & Biases of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import wandb

from alignkd.config import load_run_config
from alignkd.run_folder.paths import RunPaths
from alignkd.tracking.follow import TrackerState
from alignkd.tracking.weights_and_biases import WandbRun
from tests import tiny


def test_the_configuration_is_sent_without_the_cluster_s_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny.write_run(tmp_path / "run", 1, tracking__wandb={"project": "p"}, slurm__account="our-account")
    given: dict[str, Any] = {}
    monkeypatch.setattr(wandb, "init", lambda **arguments: given.update(arguments))
    config = load_run_config(RunPaths(run).config)
    assert config.tracking.wandb is not None
    WandbRun(TrackerState(run, "wandb"), config.tracking.wandb, config)
    assert given["config"]["training"]["global_batch_size"] == 8
    assert "our-account" not in json.dumps(given["config"])
