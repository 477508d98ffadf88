"""The judgements of a drill; the real Slurm is drilled in tests/slurm."""

import pytest
from rich.console import Console

from alignkd.errors import UserError
from launcher.drill import _folder_finding, _loss_finding, drill
from launcher.manifest import read_manifest


def test_losses() -> None:
    whole = {1: 2.0, 2: 1.5}
    assert _loss_finding(whole, dict(whole)).ok
    assert _loss_finding(whole, {1: 2.0, 2: 1.5 + 1e-7}).ok
    finding = _loss_finding(whole, {1: 2.0, 2: 1.25})
    assert not finding.ok
    assert "up to 0.25 (step 2)" in finding.text
    assert not _loss_finding(whole, {1: 2.0}).ok


def test_a_folder_that_not_every_node_sees(make_run) -> None:
    run, _ = make_run(nodes=2, gpus_per_node=1)
    (run / "attempts.jsonl").touch()
    (run / "logs" / "rank-0.log").touch()
    finding = _folder_finding(run, read_manifest(run))
    assert not finding.ok
    assert "1 of 2 ranks" in finding.text
    (run / "logs" / "rank-1.log").touch()
    assert _folder_finding(run, read_manifest(run)).ok


def test_it_is_for_slurm(make_run) -> None:
    run, _ = make_run()
    with pytest.raises(UserError, match="a drill is for a cluster"):
        next(drill(run, 8, Console()))
    assert [path.name for path in run.parent.iterdir()] == [run.name]
