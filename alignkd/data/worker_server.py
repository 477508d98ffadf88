"""The process from which the workers of the loader and of the index are forked.

A rank has threads from its first second on: its heartbeat, gloo's or NCCL's, CUDA's. A fork copies every lock
that one of them holds, and nobody in the copy ever releases it: a worker forked from a rank was seen that
never sent its first batch. So workers are forked from a process without threads, which has imported what they
need.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver, resource_tracker

# Seconds of imports, here once for all workers: what reads samples, and transformers' image processors.
PRELOADED = ["alignkd.data.loader", "transformers.models.clip.image_processing_pil_clip"]
CONTEXT = multiprocessing.get_context("forkserver")
# They tell a rank to save, to stop, or to write its stacks. Slurm sends them to every process of a step.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def start_worker_server() -> None:
    """Start the process if it does not run yet, and return at once: it imports torch meanwhile.

    It inherits a mask that blocks :data:`SIGNALS`, and so do its workers; the rank ends them when it is done.
    """
    CONTEXT.set_forkserver_preload(PRELOADED)
    # The tracker is first: the server would start it, and it unblocks signals in the process that started it.
    for start in (resource_tracker.ensure_running, forkserver.ensure_running):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(number: int) -> None:
    """In each worker: it ends with its rank, and SIGUSR2 writes its stack into the rank's log.

    torch's own watch looks at the process that forked the worker, which lives as long as the worker does.
    Torch has already limited a loader's worker to one thread.
    """
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    faulthandler.register(signal.SIGUSR2)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGUSR2,))


def _exit_with_parent() -> None:
    """Otherwise an idle worker would wait forever for a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
