"""Many real signals, while a save is in flight and during the last save."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from alignkd.checkpoint.resume import find_checkpoint
from alignkd.checkpoint.storage import Shards, Storage
from alignkd.distributed.ranks import Ranks
from alignkd.engine.setup import prepare
from alignkd.engine.signals import StopRequest
from alignkd.engine.trainer import Trainer
from alignkd.errors import EXIT_SAVED_ON_USR1
from alignkd.run_folder.checkpoints import committed_steps
from alignkd.run_folder.progress import Progress
from tests import tiny
from tests.checkpoint.test_damaged_checkpoints import go_on
from tests.checkpoint.test_killed_saves import same_trajectory
from tests.ranks import RankPool


class Storm(Storage):
    """USR1 every millisecond from step 3 on, while step 2 is still being written; TERM in the last save."""

    def __init__(self) -> None:
        self.sent = 0
        self.over = threading.Event()

    def blow(self) -> None:
        while not self.over.wait(0.001):
            os.kill(os.getpid(), signal.SIGUSR1)
            self.sent += 1

    def write_files(self, shards: Shards) -> list[Path]:
        if shards.partial.name.startswith("step-2."):
            progress = shards.partial.parent.parent / "progress.json"
            while json.loads(progress.read_text())["step"] < 3:
                time.sleep(0.01)
            threading.Thread(target=self.blow, daemon=True).start()
        return super().write_files(shards)

    def snapshot_rank(self, engine: Any, partial: Path, rank: int, *, copies: bool) -> Shards:
        if not partial.name.startswith("step-2."):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().snapshot_rank(engine, partial, rank, copies=copies)


def train_in_a_storm(ranks: Ranks, run: str) -> tuple[int, int]:
    stop, storm = StopRequest(), Storm()
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    stop.install()
    try:
        progress = Progress(Path(run), writes=ranks.is_first)
        return Trainer(prepare(Path(run), ranks, progress), stop, progress, storm).train(), storm.sent
    finally:
        storm.over.set()
        ranks.barrier()  # no signal is on its way any more
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        for number, handler in before.items():
            signal.signal(number, handler)


def test_signals_do_not_interrupt_a_save(two_ranks: RankPool, tmp_path: Path) -> None:
    whole = tiny.write_run(tmp_path / "whole", 2, training__epochs=2)
    assert [code for code, _ in two_ranks.run(go_on, str(whole))] == [0, 0]
    run = tiny.write_run(tmp_path / "run", 2, training__epochs=2)
    for code, sent in two_ranks.run(train_in_a_storm, str(run)):
        assert code == EXIT_SAVED_ON_USR1
        assert sent > 5
    steps = committed_steps(run)
    assert len(steps) == 2
    assert steps[1] == 2  # the one in flight came first
    assert 3 <= steps[0] < 8
    assert all(found.verified == tuple(steps) for found in two_ranks.run(find_all, str(run)))
    assert [(code, found.step) for code, found in two_ranks.run(go_on, str(run))] == [(0, steps[0])] * 2
    same_trajectory(run, whole)


def find_all(ranks: Ranks, run: str) -> Any:
    return find_checkpoint(Path(run), ranks, keep_last=9)
