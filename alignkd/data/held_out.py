"""The held-out data of ``evaluation.sources``: the same samples each time, in windows of micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from alignkd.config.schema import Config, DataSection
from alignkd.data.encoder import SampleEncoder
from alignkd.data.examples import ExampleReader
from alignkd.data.index import Index
from alignkd.data.loader import WindowLoader, build_sampler, loader_of

SEED = 0  # not training.seed: runs with different seeds are compared on the same samples


def held_out_data(config: Config) -> DataSection:
    """Read and encoded as the training data are, but each sample once: weights are for training."""
    sources = [source.model_copy(update={"weight": 1.0}) for source in config.evaluation.sources]
    return config.data.model_copy(update={"sources": sources})


@dataclass(frozen=True)
class HeldOut:
    """What a run evaluates on this rank."""

    make_loader: Callable[[], WindowLoader]  # of one evaluation
    fingerprint: str  # of the data
    samples: int  # of them, on all ranks together


@dataclass(frozen=True)
class Windows:
    """The order of a loader: ``at_once`` micro-batches of a rank at a time."""

    batches: list[list[int]]
    at_once: int

    @property
    def steps(self) -> Sequence[int]:
        return range(-(-len(self.batches) // self.at_once))

    def of_step(self, step: int) -> list[list[int]]:
        return self.batches[step * self.at_once : (step + 1) * self.at_once]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def held_out_loader(
    config: Config,
    index: Index,
    encoder: SampleEncoder,
    rank: int,
    world_size: int,
    accumulation: int,
    *,
    pin_memory: bool = False,
) -> WindowLoader:
    """This rank's share for one evaluation. ``accumulation``: micro-batches of a window, as of a step. Every
    rank has the same number of windows."""
    samples = min(config.evaluation.samples, len(index))
    sampler = build_sampler(config, index, samples, SEED)
    rounds = -(-samples // (config.training.micro_batch_size * world_size))
    order = Windows(sampler.micro_batches(0, rank, world_size, rounds), accumulation)
    reader = ExampleReader(held_out_data(config), index, encoder)
    return loader_of(config, reader, encoder, order, accumulation, pin_memory)
