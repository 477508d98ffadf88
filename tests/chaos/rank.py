"""``python -m tests.chaos.rank RUN ACCIDENT RANK AMOUNT`` is ``alignkd.train RUN``, except that on rank RANK

- ``clock``: the time of day is AMOUNT seconds off,
- ``late writer``: each file of a checkpoint is written AMOUNT seconds later than it could be.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

CLOCK, LATE_WRITER = "clock", "late writer"


def main(run: str, accident: str, rank: str, amount: str) -> int:
    seconds = float(amount)
    if os.environ["RANK"] == rank and accident == CLOCK:
        now = time.time
        time.time = lambda: now() + seconds
    from alignkd.checkpoint.storage import Storage
    from alignkd.engine import trainer
    from alignkd.train import main as train

    class LateStorage(Storage):
        def write_file(self, path: Path, state: object) -> None:
            time.sleep(seconds)
            super().write_file(path, state)

    if os.environ["RANK"] == rank and accident == LATE_WRITER:
        trainer.Storage = LateStorage  # type: ignore[misc]
    return train([run])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
