"""What may have happened to checkpoints between two starts: damage is named and never unpickled, the next
older one is resumed, and the run ends like an undisturbed one."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alignkd.checkpoint import resume
from alignkd.checkpoint.export import export_run
from alignkd.checkpoint.resume import CheckpointSearch, find_checkpoint
from alignkd.distributed.ranks import Ranks
from alignkd.engine.setup import prepare
from alignkd.engine.signals import StopRequest
from alignkd.engine.trainer import Trainer
from alignkd.errors import AlignkdError
from alignkd.run_folder.checkpoints import committed_steps
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.progress import Progress
from tests import tiny
from tests.checkpoint.test_killed_saves import same_trajectory
from tests.ranks import RankPool

MODEL = "mp_rank_00_model_states.pt"
OPTIMIZER = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def go_on(ranks: Ranks, run: str) -> tuple[int, CheckpointSearch]:
    progress = Progress(Path(run), writes=ranks.is_first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "PATIENCE_SECONDS", 0.2)
        state = prepare(Path(run), ranks, progress)
    return Trainer(state, StopRequest(), progress).train(), state.found


@pytest.fixture(scope="module")
def whole(two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps, checkpoints of 2, 4, 6 and 8."""
    run = tiny.write_run(
        tmp_path_factory.mktemp("whole") / "run", 2, training__epochs=2, checkpoint__keep_last=None
    )
    assert [code for code, _ in two_ranks.run(go_on, str(run))] == [0, 0]
    assert committed_steps(run) == [8, 6, 4, 2]
    return run


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """The same run at another path, killed behind step 6."""
    ignored = shutil.ignore_patterns("step-8", "student", "result.json", "progress.json")
    return Path(shutil.copytree(whole, tmp_path / "run", ignore=ignored))


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self._path),)


def bomb(path: Path) -> None:
    torch.save({"module": Bomb(path.parent.parent.parent / "exploded")}, path)


def truncated(folder: Path) -> None:
    os.truncate(folder / MODEL, (folder / MODEL).stat().st_size - 1)


def emptied(folder: Path) -> None:
    os.truncate(folder / OPTIMIZER.format(1), 0)


def bit_flipped(folder: Path) -> None:
    content = bytearray((folder / MODEL).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / MODEL).write_bytes(content)


def missing(folder: Path) -> None:
    (folder / "random-1.json").unlink()


def swapped_between_ranks(folder: Path) -> None:
    first, second = (folder / OPTIMIZER.format(rank) for rank in (0, 1))
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)


def swapped_between_steps(folder: Path) -> None:
    shutil.copyfile(folder.parent / "step-4" / MODEL, folder / MODEL)


def another_steps_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "step-4", folder)


def foreign_in_place(folder: Path) -> None:
    bomb(folder / MODEL)


def foreign_besides(folder: Path) -> None:
    bomb(folder / OPTIMIZER.format(2))


def manifest_emptied(folder: Path) -> None:
    (folder / "manifest.json").write_text("")


def manifest_of_another_tool(folder: Path) -> None:
    facts = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({"step": 6, "files": facts["files"]}))


def only_a_marker(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "COMMITTED").touch()


DAMAGES = [
    (truncated, "bytes instead of"),
    (emptied, "0 bytes instead of"),
    (bit_flipped, f"{MODEL} has another sha256"),
    (missing, "random-1.json is missing"),
    (swapped_between_ranks, "zero_pp_rank_0_mp_rank_00_optim_states.pt has"),
    (swapped_between_steps, f"{MODEL} has"),
    (another_steps_folder, "it describes step 4"),
    (foreign_in_place, f"{MODEL} has"),
    (foreign_besides, "zero_pp_rank_2_mp_rank_00_optim_states.pt is not in the manifest"),
    (manifest_emptied, "cannot be read"),
    (manifest_of_another_tool, "config"),
    (only_a_marker, "cannot be read"),
]


@pytest.mark.parametrize(("damage", "named"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_a_damaged_checkpoint_is_named_and_the_next_older_one_resumed(
    two_ranks: RankPool, whole: Path, stopped: Path, damage: Callable[[Path], None], named: str
) -> None:
    damage(RunPaths(stopped).checkpoints / "step-6")
    with pytest.raises(AlignkdError, match=named):
        export_run(stopped, stopped / "out", 6, "safetensors")
    assert not (stopped / "out").exists()
    for code, found in two_ranks.run(go_on, str(stopped)):
        assert (code, found.step, found.refused_steps) == (0, 4, (6,))
        assert len(found.refused) == 1
        assert found.refused[0].startswith("step-6: ")
        assert named in found.refused[0]
    assert not (stopped / "exploded").exists()
    same_trajectory(stopped, whole)
    assert committed_steps(stopped)[:2] == [8, 6]
    assert (RunPaths(stopped).checkpoints / "step-6.passed-over").exists()


def start(ranks: Ranks, run: str) -> None:
    """Up to the first step."""
    progress = Progress(Path(run), writes=ranks.is_first)
    Trainer(prepare(Path(run), ranks, progress), StopRequest(), progress)


def test_a_refused_checkpoint_counts_no_longer_once_an_older_one_is_resumed(
    two_ranks: RankPool, stopped: Path
) -> None:
    bit_flipped(RunPaths(stopped).checkpoints / "step-6")
    for number in ("", "-2"):
        two_ranks.run(start, str(stopped))
        assert committed_steps(stopped) == [4, 2]
        kept = RunPaths(stopped).checkpoints / f"step-6.passed-over{number}"
        assert (kept / MODEL).exists()
        shutil.copytree(kept, kept.with_name("step-6"))


def find_while_a_file_is_late(ranks: Ranks, run: str, aside: str, late: str) -> CheckpointSearch:
    if ranks.rank == 1:
        threading.Timer(1.5, lambda: Path(aside).rename(late)).start()
    return find_checkpoint(Path(run), ranks, keep_last=1)


@pytest.mark.parametrize("name", ["manifest.json", MODEL, "random-1.json"])
def test_a_file_that_a_rank_sees_late_does_not_cost_a_checkpoint(
    two_ranks: RankPool, stopped: Path, name: str
) -> None:
    path = RunPaths(stopped).checkpoints / "step-6" / name
    aside = path.rename(stopped / "aside")
    found = two_ranks.run(find_while_a_file_is_late, str(stopped), str(aside), str(path))
    assert found == [CheckpointSearch(6, (6,), ())] * 2


def test_the_pickle_that_must_not_be_loaded_would_be_noticed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    bomb(tmp_path / "checkpoints" / "step-1" / MODEL)
    torch.load(tmp_path / "checkpoints" / "step-1" / MODEL, weights_only=False)
    assert (tmp_path / "exploded").exists()


def find(ranks: Ranks, run: str) -> CheckpointSearch:
    return find_checkpoint(Path(run), ranks, keep_last=1)


def test_latest_is_never_read_and_a_run_folder_may_move(
    two_ranks: RankPool, whole: Path, stopped: Path
) -> None:
    latest = RunPaths(stopped).checkpoints / "latest"
    for content in ("", "step-8", "../../elsewhere"):  # emptied, stale, hostile
        latest.write_text(content)
        assert two_ranks.run(find, str(stopped)) == [CheckpointSearch(6, (6,), ())] * 2
    latest.unlink()
    assert two_ranks.run(find, str(stopped)) == [CheckpointSearch(6, (6,), ())] * 2
    latest.write_text("step-2")  # and there are 4 and 6
    moved = stopped.rename(stopped.parent / "moved")
    assert [(code, found.step) for code, found in two_ranks.run(go_on, str(moved))] == [(0, 6)] * 2
    same_trajectory(moved, whole)
    assert (RunPaths(moved).checkpoints / "latest").read_text() == "step-8"


def test_a_folder_without_its_marker_does_not_count(two_ranks: RankPool, whole: Path, stopped: Path) -> None:
    (RunPaths(stopped).checkpoints / "step-6" / "COMMITTED").unlink()
    assert [(code, found.step, found.refused) for code, found in two_ranks.run(go_on, str(stopped))] == [
        (0, 4, ())
    ] * 2
    same_trajectory(stopped, whole)
