"""The held-out data of ``evaluation.sources``: the same samples each time, in windows of micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from alignkd.config.schema import Config, DataSection
from alignkd.data.dataset import MicroBatchDataset
from alignkd.data.encoder import SampleEncoder
from alignkd.data.examples import ExampleReader
from alignkd.data.index import Index
from alignkd.data.loader import WindowLoader, batches_ahead
from alignkd.data.sampler import GlobalBatchSampler

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
    training, distillation = config.training, config.distillation
    samples = min(config.evaluation.samples, len(index))
    sampler = GlobalBatchSampler(
        index,
        samples,
        training.micro_batch_size,
        SEED,
        training.tokens_per_micro_batch,
        training.packing,
    )
    rounds = -(-samples // (training.micro_batch_size * world_size))
    settings = encoder.collate_settings(
        attention_rows=distillation.attention_rows,
        logit_positions=distillation.logit_positions,
        packing=training.packing,
        top_k=distillation.top_k,
    )
    reader = ExampleReader(held_out_data(config), index, encoder)
    dataset = MicroBatchDataset(reader, settings, config.data.on_bad_sample == "skip")
    order = Windows(sampler.micro_batches(0, rank, world_size, rounds), accumulation)
    workers = config.data.workers
    return WindowLoader(dataset, order, workers, batches_ahead(accumulation, workers), pin_memory=pin_memory)
