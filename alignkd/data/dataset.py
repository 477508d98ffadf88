"""The micro-batches of a rank as a map-style dataset: from a list of samples to a ``Batch``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch.utils.data import Dataset

from alignkd.data.batch import Batch
from alignkd.data.collate import CollateSettings, Example, ExpandedExample, collate
from alignkd.data.records import BadSample
from alignkd.data.sampler import GlobalBatchSampler
from alignkd.errors import AlignkdError, FileSystemError


@dataclass(frozen=True)
class Failure:
    """An error on its way out of a loader worker; an exception would lose its type and message."""

    message: str
    passing: bool  # the file system failed, not the sample; a retry may succeed


class CacheReader(Protocol):
    """A cache of the teacher, as far as the loader knows it; can be sent to its workers."""

    def __call__(self, batch: Batch, samples: Sequence[int]) -> Batch:
        """``batch``, which consists of ``samples``, with the teacher's answers. Raises AlignkdError."""
        ...


class MicroBatchDataset(Dataset[Batch | Failure]):
    """A key is a list of samples (elements of the index); an empty list gives the masked batch."""

    def __init__(
        self,
        read_example: Callable[[int], Example | ExpandedExample],
        settings: CollateSettings,
        skip_bad: bool,
        read_cache: CacheReader | None = None,
    ) -> None:
        self._read_example = read_example
        self._settings = settings
        self._skip_bad = skip_bad
        self._read_cache = read_cache

    def __getitem__(self, samples: list[int]) -> Batch | Failure:
        try:
            return self._batch(samples)
        except AlignkdError as error:
            return Failure(str(error), passing=isinstance(error, FileSystemError))

    def _batch(self, samples: list[int]) -> Batch:
        examples, kept = [], []
        for sample in samples:
            try:
                examples.append(self._read_example(sample))
                kept.append(sample)
            except BadSample:
                if not self._skip_bad:
                    raise
        batch = collate(examples, self._settings, skipped=len(samples) - len(examples))
        return batch if self._read_cache is None else self._read_cache(batch, kept)


class MicroBatchOrder(Protocol):
    """The sample lists of a loader: those of each step, and one after the other."""

    @property
    def steps(self) -> Sequence[int]: ...

    def of_step(self, step: int) -> list[list[int]]: ...

    def __iter__(self) -> Iterator[list[int]]: ...


@dataclass(frozen=True)
class RankMicroBatches:
    """The sample lists of one rank in training order, from ``start_step`` to the end of the run.

    ``accumulation``: micro-batches per step, unless a token budget decides.
    """

    sampler: GlobalBatchSampler
    rank: int
    world_size: int
    accumulation: int
    start_step: int
    stop_step: int

    @property
    def steps(self) -> range:
        return range(self.start_step, self.stop_step)

    def of_step(self, step: int) -> list[list[int]]:
        return self.sampler.micro_batches(step, self.rank, self.world_size, self.accumulation)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            yield from self.of_step(step)
