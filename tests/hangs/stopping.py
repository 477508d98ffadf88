"""``python -m tests.hangs.stopping RUN WHERE RANK STEP``: ``alignkd.train RUN``, except that rank RANK sends
SIGSTOP to itself at WHERE, in or after step STEP; or, if WHERE is ``slow``, sleeps in every forward."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from tests.checkpoint.faulty_storage import FaultyStorage

PLACES = ("rendezvous", "loader", "step", "save")


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _stop_in_call(owner: Any, name: str, number: int) -> None:
    """Stop in a call of ``owner.name``, before anything of it has happened."""
    original, calls = getattr(owner, name), []

    def called(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            stop()
        return original(*arguments, **options)

    setattr(owner, name, called)


def main(run: str, where: str, rank: str, step: str) -> int:
    from alignkd.train import main as train

    if os.environ["RANK"] == rank:
        if where == "rendezvous":
            from alignkd.distributed import ranks

            _stop_in_call(ranks, "meet", 1)
        elif where == "slow":
            from alignkd.engine.student_step import StudentStep

            original = StudentStep.forward

            def forward(*arguments: Any, **options: Any) -> Any:
                time.sleep(0.5)
                return original(*arguments, **options)

            StudentStep.forward = forward  # type: ignore[method-assign]
        elif where == "loader":
            from alignkd.engine import trainer

            _stop_in_call(trainer, "load_window", int(step))
        elif where == "step":
            from alignkd.engine import optimizer_step

            _stop_in_call(optimizer_step, "teacher_side", int(step))
        else:
            from alignkd.engine import trainer

            storage = FaultyStorage("snapshot", int(step), stop)
            trainer.Storage = lambda: storage  # type: ignore[assignment,misc]
    return train([run])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
