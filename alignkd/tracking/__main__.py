"""``python -m alignkd.tracking RUN``: give a run's new rows to its trackers, until stdin ends.

Rank 0 starts it and holds the other end of stdin, so it ends soon after rank 0, however that ends. By hand,
``< /dev/null`` writes the rows that are still missing.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from alignkd.config import load_run_config
from alignkd.config.schema import Config
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.writer_lock import is_newest
from alignkd.tracking.follow import Tracker, TrackerState, follow
from alignkd.tracking.packages import trackers_of
from alignkd.tracking.process import SIGNALS

INTERVAL = 2.0  # seconds between two looks at the rows
FINISH_SECONDS = 30.0  # for the last rows, once the training is over


def main(arguments: list[str]) -> int:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    parser = argparse.ArgumentParser(prog="python -m alignkd.tracking")
    parser.add_argument("run", type=Path)
    parser.add_argument("--resumed", type=int, help="the step that this attempt has resumed from")
    parser.add_argument("--generation", type=int, help="of the run's writer (writers/G.json); ends with it")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stdout)
    follow_run(given.run, given.resumed, given.generation)
    return 0


def follow_run(run: Path, resumed: int | None, generation: int | None) -> None:
    """Returns when stdin has ended and the trackers have the last rows; they get a limited time for that."""

    def owns_run() -> bool:
        return generation is None or is_newest(run, generation)

    config = load_run_config(RunPaths(run).config)
    over = threading.Event()
    threads = [
        threading.Thread(
            target=follow,
            args=(run, name, _opener(name, config, resumed), over, INTERVAL, owns_run),
            daemon=True,
        )
        for name in trackers_of(config.tracking)
    ]
    for thread in threads:
        thread.start()
    while sys.stdin.buffer.read(1024):
        pass
    over.set()
    deadline = time.monotonic() + FINISH_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        logging.warning(
            "warning: a tracker did not finish within %.0f s; rows may be missing", FINISH_SECONDS
        )
        sys.stdout.flush()
        os._exit(0)  # the exit handlers of a tracker would wait as well


def _opener(name: str, config: Config, resumed: int | None) -> Callable[[TrackerState], tuple[Tracker, int]]:
    def open_event_files(state: TrackerState) -> tuple[Tracker, int]:
        from alignkd.tracking.event_files import EventFiles

        last = state.step if resumed is None else min(state.step, resumed)
        return EventFiles(state.folder / name, last), last

    def open_wandb(state: TrackerState) -> tuple[Tracker, int]:
        from alignkd.tracking.weights_and_biases import WandbRun

        assert config.tracking.wandb is not None
        # W&B takes no step back: steps that are repeated after a resume keep their first values.
        return WandbRun(state, config.tracking.wandb, config), state.step

    return {"tensorboard": open_event_files, "wandb": open_wandb}[name]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
