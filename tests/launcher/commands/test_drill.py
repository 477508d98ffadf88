"""How a drill judges what it sees; tests/slurm drills a real Slurm."""

import pytest
from rich.console import Console

from alignkd.errors import UserError
from launcher.backends.slurm.drill_events import _place
from launcher.cli import checks
from launcher.commands.drill import _folder_finding, _free_names, _loss_finding, drill
from launcher.run.manifest import read_manifest


def test_losses_must_agree_step_by_step() -> None:
    whole = {1: 2.0, 2: 1.5}
    assert _loss_finding(whole, dict(whole)).ok
    assert _loss_finding(whole, {1: 2.0, 2: 1.5 + 1e-7}).ok
    finding = _loss_finding(whole, {1: 2.0, 2: 1.25})
    assert not finding.ok
    assert "up to 0.25 (step 2)" in finding.text
    assert not _loss_finding(whole, {1: 2.0}).ok


def test_every_rank_must_have_written_to_the_run_folder(make_run) -> None:
    run, _ = make_run(nodes=2, gpus_per_node=1)
    (run / "attempts.jsonl").touch()
    (run / "logs" / "rank-0.log").touch()
    finding = _folder_finding(run, read_manifest(run))
    assert not finding.ok
    assert "1 of 2 ranks" in finding.text
    (run / "logs" / "rank-1.log").touch()
    assert _folder_finding(run, read_manifest(run)).ok


def test_a_drill_of_another_back_end_is_refused(make_run) -> None:
    run, _ = make_run()
    with pytest.raises(UserError, match="a drill needs a Slurm cluster"):
        next(drill(run, 8, Console()))
    assert [path.name for path in run.parent.iterdir()] == [run.name]


def test_options_that_a_shell_cannot_parse_are_refused(make_run) -> None:
    run, _ = make_run()
    with pytest.raises(UserError, match=r"--preempt-with .*No closing quotation"):
        checks.drill(run, steps=8, preempt_with='--comment="x')


def test_the_rank_to_kill_is_found_in_its_log(tmp_path) -> None:
    log = tmp_path / "rank-1.log"
    assert _place(log, 1) is None
    log.write_text("=== attempt 1: job 5 on n2, process 71, now\n")
    assert _place(log, 1) == ("n2", "71")
    assert _place(log, 2) is None  # a line from another node may become visible late


def test_every_drill_has_its_own_folders(tmp_path) -> None:
    run = tmp_path / "run"
    assert _free_names(run) == ("run-drill-whole", "run-drill-cut")
    (tmp_path / "run-drill-cut").mkdir()  # one is enough to take both names
    assert _free_names(run) == ("run-drill-2-whole", "run-drill-2-cut")
    (tmp_path / "run-drill-2-whole").mkdir()
    assert _free_names(run) == ("run-drill-3-whole", "run-drill-3-cut")
    assert all(len(name) <= 100 for name in _free_names(tmp_path / ("x" * 100)))
