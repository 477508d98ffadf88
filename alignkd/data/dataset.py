"""Micro-batches of one rank as a map-style dataset: a list of samples in, a ``Batch`` out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch.utils.data import Dataset

from alignkd.data.batch import Batch
from alignkd.data.collate import CollateSettings, Example, collate
from alignkd.data.records import BadSample
from alignkd.data.sampler import GlobalBatchSampler
from alignkd.errors import AlignkdError, FileSystemError


@dataclass(frozen=True)
class Failure:
    """An error on its way out of a loader worker, where exceptions lose their type and message."""

    message: str
    passing: bool  # the file system's failure, not the sample's


class MicroBatchDataset(Dataset[Batch | Failure]):
    """Keys are lists of samples (elements of the index); an empty list gives the all-masked batch."""

    def __init__(
        self, read_example: Callable[[int], Example], settings: CollateSettings, skip_bad: bool
    ) -> None:
        self._read_example = read_example
        self._settings = settings
        self._skip_bad = skip_bad

    def __getitem__(self, samples: list[int]) -> Batch | Failure:
        examples = []
        for sample in samples:
            try:
                examples.append(self._read_example(sample))
            except BadSample as bad:
                if not self._skip_bad:
                    return Failure(str(bad), passing=False)
            except AlignkdError as error:
                return Failure(str(error), passing=isinstance(error, FileSystemError))
        return collate(examples, self._settings, skipped=len(samples) - len(examples))


@dataclass(frozen=True)
class RankMicroBatches:
    """Sample lists of one rank in the order of training, from ``start_step`` to the end of the run.

    ``accumulation``: micro-batches of a step where no token budget decides.
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
