"""``python -m alignkd.train RUN``: one rank of a run, resumed from its newest checkpoint if it has one.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT come from the environment, everything else from the
run folder.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import warnings
from pathlib import Path

from alignkd.config import load_run_config
from alignkd.config.schema import TrainingSection
from alignkd.data.worker_server import start_worker_server
from alignkd.distributed.determinism import fix_workspace, use_deterministic_kernels
from alignkd.engine.signals import StopRequest
from alignkd.errors import EXIT_USER_ERROR, AlignkdError, report_error
from alignkd.garbage import pause_collector, resume_collector
from alignkd.run_folder.heartbeat import Heartbeat, beat_seconds
from alignkd.run_folder.paths import RunPaths


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m alignkd.train RUN", file=sys.stderr)
        return EXIT_USER_ERROR
    pause_collector()  # until all is imported
    stop = StopRequest()
    stop.install()  # before torch is imported, which takes seconds
    stop.read(RunPaths(Path(arguments[0])).stop)
    # DeepSpeed calls these by their old names, which would fill the log of a run.
    renamed = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", renamed, FutureWarning)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2)  # the watch for hangs asks for the stacks
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    try:
        return _run(Path(arguments[0]), stop)
    except AlignkdError as error:
        return report_error(error)  # the launcher reads the message from this rank's log


def _run(run: Path, stop: StopRequest) -> int:
    config = load_run_config(RunPaths(run).config)
    training = config.training
    if config.data.workers:
        start_worker_server()  # early: it imports torch while this process does
    if training.deterministic:
        fix_workspace()
    interval = beat_seconds(training.hang_seconds)
    with Heartbeat(run, int(os.environ["RANK"]), interval) as heartbeat:  # importing torch takes seconds, too
        return _train(run, stop, heartbeat, training)


def _train(run: Path, stop: StopRequest, heartbeat: Heartbeat, training: TrainingSection) -> int:
    import torch.distributed as dist

    from alignkd.distributed.ranks import start_ranks
    from alignkd.engine.setup import prepare
    from alignkd.engine.trainer import Trainer
    from alignkd.run_folder.progress import Progress
    from alignkd.run_folder.writer_lock import WriterLock
    from alignkd.tracking.process import train_tracked

    resume_collector()
    heartbeat.enter("joining")
    if training.deterministic:
        use_deterministic_kernels()
        logging.getLogger(__name__).info("deterministic kernels only (training.deterministic)")
    ranks = start_ranks(training.rendezvous_seconds)
    progress = Progress(run, writes=ranks.is_first, heartbeat=heartbeat)
    progress.report("starting")
    lock = WriterLock(run, logging.getLogger(__name__).warning)
    with contextlib.ExitStack() as held:
        ranks.run_on_rank0(lambda: held.enter_context(lock))
        state = prepare(run, ranks, progress)
        trainer = Trainer(state, stop, progress, is_writer=lock.is_held, generation=lock.generation)
        if ranks.is_first:  # once the trainer has cut the rows that this attempt repeats
            resumed = state.found.step or 0
            code = train_tracked(trainer.train, run, state.config.tracking, resumed, lock.generation)
        else:
            code = trainer.train()
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
