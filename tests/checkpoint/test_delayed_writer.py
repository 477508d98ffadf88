"""However late a checkpoint is written, it holds the state of its step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkd.checkpoint.storage import Storage
from alignkd.distributed.ranks import Ranks
from alignkd.engine.setup import prepare
from alignkd.engine.signals import StopRequest
from alignkd.engine.trainer import Trainer
from alignkd.run_folder.checkpoints import committed_steps, step_folder
from alignkd.run_folder.progress import Progress
from tests import tiny
from tests.ranks import RankPool


class Delayed(Storage):
    """Writes the save of step 1 when step 3 is over."""

    trainer: Trainer

    def write_file(self, path: Path, state: object) -> None:
        if path.parent.name.startswith("step-1."):
            deadline = time.monotonic() + 60
            while self.trainer.step < 3 and time.monotonic() < deadline:
                time.sleep(0.01)
        super().write_file(path, state)


def train(ranks: Ranks, run: str, late: bool) -> int:
    storage = Delayed() if late else Storage()
    progress = Progress(Path(run), writes=ranks.is_first)
    trainer = Trainer(prepare(Path(run), ranks, progress), StopRequest(), progress, storage)
    if isinstance(storage, Delayed):
        storage.trainer = trainer
        save = trainer._save

        def first_save_only(*, wait: bool) -> None:
            """The next save would wait for this one, and it for step 3."""
            if trainer.step in (1, trainer.state.total_steps):
                save(wait=wait)

        trainer._save = first_save_only  # type: ignore[method-assign]
    return trainer.train()


def tensors(state: Any, place: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors in a state, with their places."""
    if isinstance(state, torch.Tensor):
        yield place, state
    elif isinstance(state, dict):
        for key, item in state.items():
            yield from tensors(item, f"{place}/{key}")
    elif isinstance(state, list | tuple):
        for number, item in enumerate(state):
            yield from tensors(item, f"{place}/{number}")


def shards(run: Path, step: int) -> dict[str, Any]:
    folder = step_folder(run, step)
    return {path.name: torch.load(path, weights_only=False) for path in sorted(folder.glob("*.pt"))}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_checkpoint_holds_the_state_of_its_step_however_late_it_is_written(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    written = {}
    for late in (False, True):
        run = tiny.write_run(
            tmp_path / f"late-{late}",
            2,
            student__zero_stage=stage,
            checkpoint__every=1,
            checkpoint__keep_last=None,
        )
        assert two_ranks.run(train, str(run), late) == [0, 0]
        assert committed_steps(run) == ([4, 1] if late else [4, 3, 2, 1])
        written[late] = shards(run, 1)
    assert written[True].keys() == written[False].keys()
    for name, state in written[False].items():
        found, expected = list(tensors(written[True][name])), list(tensors(state))
        assert [place for place, _ in found] == [place for place, _ in expected]
        for (place, value), (_, other) in zip(found, expected, strict=True):
            assert value.equal(other), f"{name}: {place}"
    later = dict(tensors(shards(tmp_path / "late-False", 3)))
    assert any(not later[place].equal(value) for place, value in tensors(written[False]))
