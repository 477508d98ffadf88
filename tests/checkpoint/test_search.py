"""What the search for a checkpoint costs the file system: each rank a share, whatever is kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkd.checkpoint import resume
from alignkd.checkpoint.resume import CheckpointSearch, find_checkpoint
from alignkd.distributed.ranks import Ranks
from alignkd.errors import AlignkdError
from alignkd.run_folder.checkpoints import MANIFEST, MARKER, marker_text, step_folder
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.patience import Patience
from tests import tiny
from tests.ranks import RankPool

FILES = 60
STEPS = (2, 4, 6, 8)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four checkpoints of 60 files."""
    run = tiny.write_run(tmp_path / "run", 4)
    for step in STEPS:
        folder = step_folder(run, step)
        folder.mkdir(parents=True)
        files = {}
        for number in range(FILES):
            content = f"{step}-{number}".encode()
            (folder / f"{number}.pt").write_bytes(content)
            files[f"{number}.pt"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        facts = {"step": step, "world_size": 4, "config": {}, "data": "", "teacher": None, "files": files}
        (folder / MANIFEST).write_text(json.dumps(facts))
        (folder / MARKER).write_text(marker_text(folder))
    return run


def search(ranks: Ranks, run: str, keep_last: int | None) -> CheckpointSearch | tuple[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "PATIENCE_SECONDS", 0.2)
        try:
            return find_checkpoint(Path(run), ranks, keep_last)
        except AlignkdError as error:
            return type(error).__name__, str(error)


def counted_search(ranks: Ranks, run: str) -> tuple[CheckpointSearch, Counter[str], list[str]]:
    """With the calls that reached the folder of checkpoints, and the files whose contents were read."""
    calls: Counter[str] = Counter()
    read: list[str] = []
    open_file = Path.open

    def counting(name: str, call: Any) -> Any:
        def counted(path: Any = ".", *arguments: Any, **options: Any) -> Any:
            calls[name] += str(path).startswith(f"{run}/checkpoints")
            return call(path, *arguments, **options)

        return counted

    def opening(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.suffix == ".pt":
            read.append(f"{path.parent.name}/{path.name}")
        return open_file(path, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("stat", "scandir", "listdir"):
            patch.setattr(os, name, counting(name, getattr(os, name)))
        patch.setattr(Path, "open", opening)
        found = find_checkpoint(Path(run), ranks, keep_last=3)
    return found, calls, read


def test_only_rank_0_walks_and_only_the_newest_checkpoint_is_read_each_file_by_one_rank(
    four_ranks: RankPool, run: Path
) -> None:
    answers = four_ranks.run(counted_search, str(run))
    assert {found for found, _, _ in answers} == {CheckpointSearch(8, (8, 6, 4), ())}
    read = sorted(name for _, _, names in answers for name in names)
    assert read == sorted(f"step-8/{number}.pt" for number in range(FILES))
    for rank, (_, calls, names) in enumerate(answers):
        assert len(names) == FILES / 4
        if rank == 0:
            # Each file of three checkpoints: once for what it is, once for its size, and for the hash.
            assert 3 * FILES <= calls["stat"] <= 3 * FILES * 2 + FILES / 4 + 40
        else:
            assert calls["stat"] <= FILES / 4 + 1
            assert calls["scandir"] == calls["listdir"] == 0


def test_an_older_checkpoint_counts_by_names_and_sizes_and_is_read_once_it_is_the_newest(
    four_ranks: RankPool, run: Path
) -> None:
    path = step_folder(run, 6) / "7.pt"
    path.write_bytes(b"x" * path.stat().st_size)
    (step_folder(run, 4) / "7.pt").unlink()
    assert four_ranks.run(search, str(run), 3) == [CheckpointSearch(8, (8, 6, 2), ())] * 4
    assert four_ranks.run(search, str(run), 1) == [CheckpointSearch(8, (8,), ())] * 4
    assert four_ranks.run(search, str(run), None) == [CheckpointSearch(8, (8,), ())] * 4
    (step_folder(run, 8) / "stranger.pt").touch()
    (found,) = set(four_ranks.run(search, str(run), 1))
    assert (found.step, found.verified, found.refused_steps) == (2, (2,), (8, 6, 4))
    assert found.refused == (
        "step-8: stranger.pt is not in the manifest",
        "step-6: 7.pt has another sha256 than when it was written",
        "step-4: 7.pt is missing",
    )


def search_where_a_file_is_not_visible(ranks: Ranks, run: str) -> CheckpointSearch | tuple[str, str]:
    """On rank 3, whose host does not show it yet."""
    open_file = Path.open

    def opening(path: Path, *arguments: Any, **options: Any) -> Any:
        if ranks.rank == 3 and path.suffix == ".pt":
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return open_file(path, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", opening)
        return search(ranks, run, 1)


def test_a_file_that_rank_0_sees_and_another_rank_does_not_is_no_reason_to_pass_a_checkpoint_over(
    four_ranks: RankPool, run: Path
) -> None:
    for kind, message in four_ranks.run(search_where_a_file_is_not_visible, str(run)):
        assert kind == "TrainingError"
        assert "step-8: cannot be read: rank 3: " in message


class Clock:
    """Time passes only while somebody sleeps; ``at`` 5 seconds something happens."""

    def __init__(self, at: Callable[[], None]) -> None:
        self.seconds, self._at = 0.0, at

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        if self.seconds == 5:
            self._at()


def steps_seen(run: Path, at_five: Callable[[], None] = lambda: None) -> tuple[list[int], float]:
    """And the seconds that were waited for them."""
    clock = Clock(at_five)
    steps, missing = resume._visible_steps(run, Patience(30.0, lambda: clock.seconds, clock.sleep))
    assert missing is None
    return steps, clock.seconds


def test_the_newest_save_on_record_is_waited_for(run: Path) -> None:
    assert steps_seen(run) == ([8, 6, 4, 2], 0.0)  # nothing is on record
    marker = step_folder(run, 8) / MARKER
    text = marker.read_text()

    def put_back() -> None:
        marker.write_text(text)

    for saved, waited in ((6, 0.0), (8, 30.0)):
        marker.unlink(missing_ok=True)
        RunPaths(run).progress.write_text(f'{{"phase": "training", "saved_step": {saved}}}')
        assert steps_seen(run) == ([6, 4, 2], waited)
    assert steps_seen(run, put_back) == ([8, 6, 4, 2], 5.0)


@pytest.mark.parametrize("suffix", ["set-aside", "set-aside-2", "passed-over", "unmarked"])
def test_a_save_that_was_put_aside_is_not_waited_for(run: Path, suffix: str) -> None:
    RunPaths(run).progress.write_text('{"phase": "training", "saved_step": 8}')
    step_folder(run, 8).rename(RunPaths(run).checkpoints / f"step-8.{suffix}")
    assert steps_seen(run) == ([6, 4, 2], 0.0)
