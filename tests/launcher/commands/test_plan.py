"""What is planned for a request; tests/launcher/cli/test_plan.py reads what is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.commands.plan import PlanRequest, plan_run


@pytest.mark.parametrize(("option", "expected"), [(None, 4), (2, 2)])
def test_a_site_says_how_many_gpus_a_node_has(config_file: Path, option: int | None, expected: int) -> None:
    overrides = ("slurm={gpus_per_node: 4}", "training.micro_batch_size=1")
    found = plan_run(PlanRequest(config_file, 2, option, overrides=overrides))
    assert found.plan.cluster.ranks == 2 * expected
