"""`alignkd report`: the file it writes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignkd.errors import UserError
from launcher.commands.report import ReportRequest, write_report
from launcher.report.page import MAX_RUNS
from tests.launcher.cli.command import alignkd


def test_the_command_writes_the_page_without_torch(make_run, tmp_path: Path) -> None:
    run = make_run()[0]
    done = alignkd("report", run, "--out", tmp_path / "new" / "page.html")
    assert (done.returncode, done.stdout) == (0, f"wrote {tmp_path / 'new' / 'page.html'}\n")
    assert not done.imported & {"torch", "transformers", "deepspeed"}
    assert "<!doctype html>" in (tmp_path / "new" / "page.html").read_text()
    refused = alignkd("report", tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("alignkd: error: ")
    assert "not a run folder" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_runs_that_cannot_be_shown_are_refused(make_run, tmp_path: Path) -> None:
    run, out = make_run()[0], tmp_path / "page.html"

    def refuse(match: str, *runs: Path, to: Path = out) -> None:
        with pytest.raises(UserError, match=match):
            write_report(ReportRequest(runs, to, ()))
        assert not out.exists()

    refuse("given twice", run, run.parent / "." / run.name)
    refuse(f"at most {MAX_RUNS}", *(run.parent / str(number) for number in range(MAX_RUNS + 1)))
    refuse("not a run folder", run, tmp_path)
    refuse("cannot be written", run, to=run / "config.yaml" / "page.html")
    (run / "config.yaml").write_text("a: [")
    refuse("config.yaml", run)
    (run / "config.yaml").write_text("[]")
    refuse("must be a mapping", run)
    (run / "config.yaml").unlink()
    refuse("config.yaml", run)
