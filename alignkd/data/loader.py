"""From a configuration and an index to the windows of micro-batches that optimizer steps consume."""

from __future__ import annotations

import atexit
import logging
import math
import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from types import TracebackType

import torch
from torch.utils.data import DataLoader

from alignkd.config.schema import Config
from alignkd.data.batch import Batch
from alignkd.data.dataset import (
    CacheReader,
    Failure,
    MicroBatchDataset,
    MicroBatchOrder,
    RankMicroBatches,
)
from alignkd.data.encoder import SampleEncoder
from alignkd.data.examples import ExampleReader
from alignkd.data.index import Index
from alignkd.data.sampler import GlobalBatchSampler
from alignkd.data.worker_server import CONTEXT, start_worker, start_worker_server
from alignkd.errors import AlignkdError, FileSystemError, TrainingError, UserError

log = logging.getLogger(__name__)
WINDOWS_AHEAD = 1.5


def build_sampler(
    config: Config, index: Index, samples: int | None = None, seed: int | None = None
) -> GlobalBatchSampler:
    """``samples`` of a step and ``seed`` of the order: by default those of the training."""
    training = config.training
    return GlobalBatchSampler(
        index,
        training.global_batch_size if samples is None else samples,
        training.micro_batch_size,
        training.seed if seed is None else seed,
        training.tokens_per_micro_batch,
        training.packing,
    )


def build_loader(
    config: Config,
    index: Index,
    encoder: SampleEncoder,
    rank: int,
    world_size: int,
    accumulation: int,
    start_step: int = 0,
    *,
    pin_memory: bool = False,
    read_cache: CacheReader | None = None,
) -> WindowLoader:
    """This rank's windows from ``start_step`` to the last step of the run. ``pin_memory`` speeds up copies
    to an accelerator; ``read_cache`` reads a cache of the teacher."""
    sampler = build_sampler(config, index)
    stop_step = sampler.total_steps(config.training.epochs, config.training.max_steps)
    order = RankMicroBatches(sampler, rank, world_size, accumulation, start_step, stop_step)
    reader = ExampleReader(config.data, index, encoder)
    return loader_of(config, reader, encoder, order, accumulation, pin_memory, read_cache)


def loader_of(
    config: Config,
    reader: ExampleReader,
    encoder: SampleEncoder,
    order: MicroBatchOrder,
    accumulation: int,
    pin_memory: bool,
    read_cache: CacheReader | None = None,
) -> WindowLoader:
    """The micro-batches of ``order``, collated for the losses of ``config``."""
    distillation = config.distillation
    settings = encoder.collate_settings(
        attention_rows=distillation.attention_rows,
        logit_positions=distillation.logit_positions,
        packing=config.training.packing,
        top_k=distillation.top_k,
    )
    skip_bad = config.data.on_bad_sample == "skip"
    dataset = MicroBatchDataset(reader, settings, skip_bad, read_cache)
    workers = config.data.workers
    return WindowLoader(dataset, order, workers, batches_ahead(accumulation, workers), pin_memory=pin_memory)


def batches_ahead(accumulation: int, workers: int) -> int | None:
    """Micro-batches that each worker prepares ahead: together half a window more than a step
    consumes at once, and not less than torch's default. None without workers."""
    return max(2, math.ceil(WINDOWS_AHEAD * accumulation / workers)) if workers else None


class WindowLoader:
    """Yields the list of micro-batches of each optimizer step; can be iterated once.

    Use it as a context manager, or call :meth:`close`: workers ignore the signals that would end them.
    """

    def __init__(
        self,
        dataset: MicroBatchDataset,
        order: MicroBatchOrder,
        workers: int,
        ahead: int | None,
        *,
        pin_memory: bool = False,
    ) -> None:
        self._order = order
        self._loader = DataLoader(
            dataset,
            batch_size=None,  # an element of the dataset is a whole micro-batch
            sampler=order,
            num_workers=workers,
            prefetch_factor=ahead,
            pin_memory=pin_memory,
            multiprocessing_context=CONTEXT if workers else None,
            worker_init_fn=start_worker,
            # torch draws a seed for the workers, which must not change the random state of the run.
            generator=torch.Generator(),
        )
        self._iterator: Iterator[Batch | Failure] | None = None
        self._workers: list[BaseProcess] = []

    def __len__(self) -> int:
        """The number of optimizer steps, counted from the start step."""
        return len(self._order.steps)

    def __iter__(self) -> Iterator[list[Batch]]:
        """Raises UserError with the file, entry, id and path of an unusable sample, FileSystemError if the
        file system failed (such a sample is never skipped), and TrainingError if a worker was killed."""
        self._start()
        for step in self._order.steps:
            yield [self._next() for _ in self._order.of_step(step)]

    def _start(self) -> None:
        assert self._iterator is None, "a loader can be iterated only once"
        if self._loader.num_workers:
            start_worker_server()
        before = set(multiprocessing.active_children())
        before_torch = signal.getsignal(signal.SIGCHLD)
        self._iterator = iter(self._loader)
        if signal.getsignal(signal.SIGCHLD) is not before_torch:
            # torch's handler would raise wherever this rank happens to be when a worker dies, for example in
            # a collective or a save. The next request for a batch reports the death anyway.
            signal.signal(signal.SIGCHLD, before_torch)
        self._workers = [child for child in multiprocessing.active_children() if child not in before]
        # At exit, multiprocessing sends SIGTERM to its children, which ours ignore, and would wait forever.
        atexit.register(self.close)

    def _next(self) -> Batch:
        assert self._iterator is not None, "the loader is closed"
        try:
            result = next(self._iterator)
        except (RuntimeError, OSError) as error:  # torch's; OSError if a batch was being transferred
            if self._one_was_killed():
                raise TrainingError(
                    "a data loader worker was killed, most likely because memory ran out; request more "
                    "(slurm.memory), or lower data.workers"
                ) from error
            raise
        if isinstance(result, Failure):
            raise (FileSystemError if result.passing else UserError)(result.message)
        return result

    def _one_was_killed(self) -> bool:
        ended = connection.wait([worker.sentinel for worker in self._workers], timeout=1.0)
        for worker in self._workers:
            if worker.sentinel in ended:
                worker.join()  # its files are closed before its exit code is known
        return any(worker.exitcode == -signal.SIGKILL for worker in self._workers)

    def close(self) -> None:
        """End the workers. May be called more than once."""
        atexit.unregister(self.close)
        self._iterator = None  # the last reference: torch tells its workers to end, and waits a few seconds
        for worker in self._workers:
            worker.kill()
            worker.join()
        self._workers = []

    def __enter__(self) -> WindowLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_window(windows: Iterator[list[Batch]]) -> tuple[list[Batch], AlignkdError | None]:
    """The next window, or why this rank has none. To raise here would deadlock the other ranks."""
    try:
        return next(windows), None
    except AlignkdError as error:
        return [], error
    except Exception as error:  # a worker that crashed, for instance
        log.exception("the data loader failed")
        return [], TrainingError(f"the data loader failed: {type(error).__name__}: {error}")
