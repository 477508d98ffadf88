"""The judgements of a drill; the real Slurm is drilled in tests/slurm."""

import pytest
from rich.console import Console

from alignkd.errors import UserError
from launcher.cli import runs as cli_runs
from launcher.commands.drill import _folder_finding, _free_names, _loss_finding, _place, drill
from launcher.run.manifest import read_manifest


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


def test_options_that_no_shell_would_read(make_run) -> None:
    run, _ = make_run()
    with pytest.raises(UserError, match=r"--preempt-with .*No closing quotation"):
        cli_runs.drill(run, steps=8, preempt_with='--comment="x')


def test_where_the_rank_to_kill_is(tmp_path) -> None:
    log = tmp_path / "rank-1.log"
    assert _place(log, 1) is None
    log.write_text("=== attempt 1: job 5 on n2, process 71, now\n")
    assert _place(log, 1) == ("n2", "71")
    assert _place(log, 2) is None  # another node's line may be seen late


def test_every_drill_has_folders_of_its_own(tmp_path) -> None:
    run = tmp_path / "run"
    assert _free_names(run) == ("run-drill-whole", "run-drill-cut")
    (tmp_path / "run-drill-cut").mkdir()  # one is enough: the two belong together
    assert _free_names(run) == ("run-drill-2-whole", "run-drill-2-cut")
    (tmp_path / "run-drill-2-whole").mkdir()
    assert _free_names(run) == ("run-drill-3-whole", "run-drill-3-cut")
    assert all(len(name) <= 100 for name in _free_names(tmp_path / ("x" * 100)))
