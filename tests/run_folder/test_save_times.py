from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
from pathlib import Path

import pytest
from rich.console import Console

from alignkd.distributed.ranks import Ranks
from alignkd.run_folder.save_times import lead_warning, measured_stop_seconds, stop_seconds
from launcher.backends.slurm import backend as slurm
from launcher.commands import control
from tests import tiny
from tests.checkpoint.killing import CPU_RANKS
from tests.checkpoint.test_damaged_checkpoints import go_on
from tests.ranks import RankPool

MANIFEST = {
    "step": 4,
    "step_seconds": 30.0,
    "timing": {"save_seconds": 90.0},
    "config": {"checkpoint": {"asynchronous": False}},
}


def write(run: Path, step: int, manifest: object) -> None:
    folder = run / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "COMMITTED").touch()


def test_the_newest_checkpoint_says_how_long_a_stop_takes(tmp_path: Path) -> None:
    assert measured_stop_seconds(tmp_path) is None
    write(tmp_path, 2, {**MANIFEST, "step": 2, "step_seconds": 1.0})
    write(tmp_path, 4, MANIFEST)
    assert measured_stop_seconds(tmp_path) == 120.0


@pytest.mark.parametrize(
    "manifest", [{"step": 4}, {**MANIFEST, "timing": None}, {**MANIFEST, "timing": {}}, []]
)
def test_a_manifest_without_timing_gives_no_warning(tmp_path: Path, manifest: object) -> None:
    write(tmp_path, 4, manifest)
    assert measured_stop_seconds(tmp_path) is None


def test_an_asynchronous_save_may_have_to_finish_before_the_last_one() -> None:
    manifest = {**MANIFEST, "config": {"checkpoint": {"asynchronous": True}}}
    assert stop_seconds(manifest) == 30.0 + 2 * 90.0


def test_a_signal_that_comes_too_late_is_warned_of_with_a_better_value() -> None:
    assert lead_warning(None, 10) is None
    assert lead_warning(stop_seconds(MANIFEST), 120) is None
    warning = lead_warning(stop_seconds(MANIFEST), 119)
    assert warning is not None
    for part in ("may take 120 s", "119 s before the time limit", "slurm.signal_seconds", "240 or more"):
        assert part in warning


def warnings_of_a_start(ranks: Ranks, run: str) -> list[str]:
    """What rank 0 logs when it resumes in a Slurm job."""
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("alignkd").addHandler(handler)
    os.environ["SLURM_JOB_ID"] = "7"
    try:
        go_on(ranks, run)
    finally:
        del os.environ["SLURM_JOB_ID"]
        logging.getLogger("alignkd").removeHandler(handler)
    return [text for text in heard if "slurm.signal_seconds" in text]


def test_a_start_in_a_job_warns_from_what_was_measured(
    two_ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny.write_run(tmp_path / "run", 2, checkpoint__asynchronous=False, slurm__signal_seconds=1000)
    two_ranks.run(go_on, str(run))
    path = run / "checkpoints" / "step-4" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert 0 < manifest["timing"]["save_seconds"] < 1000
    assert 0 < manifest["step_seconds"] < 1000
    assert two_ranks.run(warnings_of_a_start, str(run)) == [[], []]
    manifest["timing"]["save_seconds"] = 5000.0
    path.write_text(json.dumps(manifest))
    path.with_name("COMMITTED").write_text("")  # its marker would not fit the manifest any more
    (warning,), nothing = two_ranks.run(warnings_of_a_start, str(run))
    assert "1000 s before" in warning
    assert nothing == []
    # And so does whoever submits it.
    monkeypatch.setattr(slurm, "submit", lambda _run, _options: "7")
    monkeypatch.setattr(slurm, "retarget_dependency", lambda _run, _job: None)
    console = Console(file=io.StringIO(), width=200)
    control.start_run(run, dataclasses.replace(CPU_RANKS, backend="slurm"), console)
    assert warning in console.file.getvalue()  # type: ignore[attr-defined]
