"""No visible checkpoint, although there were some: the start stops and changes nothing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from alignkd.checkpoint import resume
from alignkd.distributed.ranks import Ranks
from alignkd.engine.setup import prepare
from alignkd.engine.signals import StopRequest
from alignkd.engine.trainer import Trainer
from alignkd.errors import EXIT_USER_ERROR, AlignkdError
from alignkd.run_folder.checkpoints import committed_steps
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.progress import Progress
from launcher.run.from_scratch import saves_given_up
from launcher.run.rollback import rollback_to
from tests import tiny
from tests.checkpoint.test_killed_saves import same_trajectory
from tests.ranks import RankPool


def train_on(ranks: Ranks, run: str) -> tuple[int, int | str]:
    """Exit code, and the step resumed from or what every rank says."""
    progress = Progress(Path(run), writes=ranks.is_first)
    progress.report("starting")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resume, "PATIENCE_SECONDS", 0.2)
            state = prepare(Path(run), ranks, progress)
        return Trainer(state, StopRequest(), progress).train(), state.found.step or 0
    except AlignkdError as error:
        return error.exit_code, str(error)


@pytest.fixture(scope="module")
def whole(two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps, checkpoints of 1, 2, 3 and 4."""
    run = tiny.write_run(
        tmp_path_factory.mktemp("whole") / "run", 2, checkpoint__every=1, checkpoint__keep_last=None
    )
    assert two_ranks.run(train_on, str(run)) == [(0, 0)] * 2
    assert committed_steps(run) == [4, 3, 2, 1]
    return run


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """The same run at another path, killed behind step 3."""
    ignored = shutil.ignore_patterns("step-4", "student", "result.json")
    return Path(shutil.copytree(whole, tmp_path / "run", ignore=ignored))


def contents(run: Path) -> dict[Path, bytes]:
    """All but what a start may write before it knows what to resume from."""
    passing = ("progress.json", "index.bin")
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in passing}


def test_a_clean_up_of_empty_files_takes_no_marker(two_ranks: RankPool, whole: Path, stopped: Path) -> None:
    subprocess.run(["find", str(RunPaths(stopped).checkpoints), "-empty", "-delete"], check=True)
    assert two_ranks.run(train_on, str(stopped)) == [(0, 3)] * 2
    same_trajectory(stopped, whole)


def test_lost_markers_stop_the_start_and_can_be_put_back(
    two_ranks: RankPool, whole: Path, stopped: Path
) -> None:
    markers = sorted(RunPaths(stopped).checkpoints.glob("step-*/COMMITTED"))
    for marker in markers:
        marker.write_text("")  # as earlier versions wrote them
    subprocess.run(["find", str(RunPaths(stopped).checkpoints), "-empty", "-delete"], check=True)
    before = contents(stopped)
    for _ in range(2):  # the first start does not make the second one forget
        for code, message in two_ranks.run(train_on, str(stopped)):
            assert code == EXIT_USER_ERROR
            assert "step-3, step-2, step-1: only the marker is missing" in str(message)
        assert contents(stopped) == before
    markers[-1].touch()
    assert two_ranks.run(train_on, str(stopped)) == [(0, 3)] * 2
    same_trajectory(stopped, whole)
    # The others were whole: they are kept, and do not count.
    assert {path.name for path in RunPaths(stopped).checkpoints.glob("*.unmarked")} == {
        "step-1.unmarked",
        "step-2.unmarked",
    }


def test_a_checkpoint_folder_that_is_not_mounted_for_one_start_costs_nothing(
    two_ranks: RankPool, whole: Path, stopped: Path
) -> None:
    away = RunPaths(stopped).checkpoints.rename(stopped.parent / "away")
    RunPaths(stopped).checkpoints.mkdir()  # the mount point
    before = contents(stopped)
    for code, message in two_ranks.run(train_on, str(stopped)):
        assert code == EXIT_USER_ERROR
        assert "no checkpoint is visible, but step" in str(message)
    assert contents(stopped) == before
    RunPaths(stopped).checkpoints.rmdir()
    away.rename(RunPaths(stopped).checkpoints)
    assert two_ranks.run(train_on, str(stopped)) == [(0, 3)] * 2
    same_trajectory(stopped, whole)
    assert [row["step"] for row in tiny.metrics_rows(stopped)] == [1, 2, 3, 4]


def test_from_scratch_trains_from_step_0_and_deletes_nothing(
    two_ranks: RankPool, whole: Path, stopped: Path
) -> None:
    rows = RunPaths(stopped).metrics.read_text()
    with rollback_to(stopped, 0, print), saves_given_up(stopped, True):
        pass
    assert two_ranks.run(train_on, str(stopped)) == [(0, 0)] * 2
    same_trajectory(stopped, whole)
    assert (stopped / "metrics.jsonl.given-up").read_text() == rows
    aside = {path.name for path in RunPaths(stopped).checkpoints.glob("*.set-aside")}
    assert aside == {"step-1.set-aside", "step-2.set-aside", "step-3.set-aside"}
    assert committed_steps(stopped) == [4, 3, 2, 1]
