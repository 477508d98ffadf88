"""Write a cache of the teacher, on any number of ranks, and resume one that was killed.

Every sample has a forward of its own, so its hidden states depend on nothing else: not on its neighbours, the
number of ranks, or where a start began.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from alignkd.config.schema import Config
from alignkd.data.batch import Batch
from alignkd.data.dataset import MicroBatchDataset
from alignkd.data.encoder import SampleEncoder
from alignkd.data.examples import ExampleReader
from alignkd.data.image_sample import image_places
from alignkd.data.index import Index
from alignkd.data.loader import WindowLoader, batches_ahead
from alignkd.distributed.ranks import Ranks
from alignkd.errors import AlignkdError, FileSystemError, UserError
from alignkd.models.building import DTYPES, BuildOptions
from alignkd.models.families.interface import VisionLanguageModel
from alignkd.models.loading import fingerprint, load_model
from alignkd.run_folder.atomic_files import TEMPORARY, write_json
from alignkd.run_folder.patience import PATIENCE_SECONDS, Patience
from alignkd.teacher.cache_forms import FORMS, Form, Tensors
from alignkd.teacher.cache_shards import write_shard
from alignkd.teacher.cache_top_k import TeacherHead
from alignkd.teacher.targets import logit_hidden
from alignkd.teacher_cache.folder import (
    SHARD_SAMPLES,
    CachePaths,
    Identity,
    Manifest,
    Shard,
    read_identity,
    read_record,
)
from alignkd.teacher_cache.key import cache_key, differences, precision_of, top_k_of

log = logging.getLogger(__name__)
Report = Callable[[int, int], None]  # shards of this rank that are written, and all of them


@dataclass(frozen=True)
class ShardOrder:
    """The samples of some shards, one by one: for the loader, a shard is a step, a sample a micro-batch."""

    identity: Identity
    steps: Sequence[int]  # numbers of the shards

    def of_step(self, step: int) -> list[list[int]]:
        return [[sample] for sample in self.identity.samples_of(step)]

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            yield from self.of_step(step)


def write_cache(
    folder: Path,
    config: Config,
    index: Index,
    encoder: SampleEncoder,
    ranks: Ranks,
    report: Report = lambda done, total: None,
    shard_samples: int = SHARD_SAMPLES,
) -> Manifest:
    """Write what is missing of the cache in ``folder``, the manifest last. Collective.

    Raises UserError when the folder holds the cache of something else.
    """
    assert config.model.teacher is not None, "checked before"
    options = BuildOptions(DTYPES[precision_of(config)], ranks.device)
    model = load_model(config.model.teacher, options).eval().requires_grad_(False)
    begun: list[tuple[Identity, list[int]]] = []

    def begin() -> None:
        identity = _identity(config, index, model, shard_samples)
        _begin(folder, identity)
        missing = [n for n in range(identity.shard_count) if read_record(folder, n) is None]
        begun.append((identity, missing))

    ranks.run_on_rank0(begin)
    identity, missing = ranks.broadcast_object(begun[0] if begun else None)
    log.info("%d of %d shards are missing", len(missing), identity.shard_count)
    order = ShardOrder(identity, missing[ranks.rank :: ranks.world_size])
    failure: AlignkdError | None = None
    try:
        loader, head = _loader(config, index, encoder, order, ranks), _head(config, model)
        _write_shards(folder, model, head, loader, order, report)
    except OSError as error:
        failure = FileSystemError(f"{folder}: cannot be written ({error})")
    except AlignkdError as error:
        failure = error
    if failure is not None:  # the other ranks hear of it when they are done, which may take hours
        log.error("%s", failure)
    if ranks.sum_on_host([int(failure is not None)]) > [0]:
        ranks.raise_together(failure)
    found: list[Manifest] = []
    ranks.run_on_rank0(lambda: found.append(_finish(folder, identity, Patience(PATIENCE_SECONDS))))
    manifest: Manifest = ranks.broadcast_object(found[0] if found else None)
    return manifest


def _identity(config: Config, index: Index, model: VisionLanguageModel, shard_samples: int) -> Identity:
    images = tuple(image_places(config.data, index))
    return Identity(
        key=cache_key(config, images),
        images=images,
        weights=fingerprint(model),
        width=top_k_of(config) or model.facts.hidden_size,
        samples=len(index),
        shard_samples=shard_samples,
        entries=index.entries_hash(),
    )


def _begin(folder: Path, identity: Identity) -> None:
    """A second start at the same time makes the first lose a file that it is writing, and fail.

    What counts stays whole, but of a shard that both write, on different devices, file and record may come
    from one each: each sample has its own checksum and is read, while ``--verify`` complains. That is why
    `alignkd cache` refuses to start beside a job, or beside another one.
    """
    paths, found = CachePaths(folder), read_identity(folder)
    if found is None:
        paths.shards.mkdir(parents=True, exist_ok=True)
        write_json(paths.identity, identity.as_json())
    elif found != identity:
        problems = differences(found.key, identity.key) or ["another index, or shards of another size"]
        raise UserError(
            "\n  ".join([f"{folder}: holds the cache of something else; what differs:", *problems])
            + "\nGive another folder, or remove this one."
        )
    for unfinished in paths.shards.glob(f".*{TEMPORARY}"):  # half a gigabyte each; a kill leaves them
        unfinished.unlink(missing_ok=True)


def _loader(
    config: Config, index: Index, encoder: SampleEncoder, order: ShardOrder, ranks: Ranks
) -> WindowLoader:
    settings = encoder.collate_settings(logit_positions=config.distillation.logit_positions)
    reader = ExampleReader(config.data, index, encoder)
    dataset = MicroBatchDataset(reader, settings, skip_bad=config.data.on_bad_sample == "skip")
    workers = config.data.workers
    ahead = batches_ahead(order.identity.shard_samples, workers)
    return WindowLoader(dataset, order, workers, ahead, pin_memory=ranks.device.type != "cpu")


@torch.no_grad()
def _write_shards(
    folder: Path,
    model: VisionLanguageModel,
    head: TeacherHead,
    loader: WindowLoader,
    order: ShardOrder,
    report: Report,
) -> None:
    form = FORMS[order.identity.form]
    with loader:
        for done, (shard, batches) in enumerate(zip(order.steps, loader, strict=True), start=1):
            samples = [_answers(model, head, batch, form) for batch in batches]
            write_shard(folder, shard, order.identity.samples_of(shard).start, samples)
            report(done, len(order.steps))


def _head(config: Config, model: VisionLanguageModel) -> TeacherHead:
    weight_WD = model.head.cut(model.head.weight)
    return TeacherHead(weight_WD, config.teacher.cache_top_k, config.distillation.temperature)


def _answers(model: VisionLanguageModel, head: TeacherHead, batch: Batch, form: Form) -> Tensors:
    """On the host; without a row for a sample that was skipped because it is bad."""
    moved = batch.to(next(model.parameters()).device)
    encoded = form.encode(logit_hidden(moved, model(moved)), head)
    return {name: tensor.cpu() for name, tensor in encoded.items()}


def _finish(folder: Path, identity: Identity, patience: Patience) -> Manifest:
    """Rank 0 may see what the other hosts wrote only after a while."""
    shards: list[Shard] = []
    for number in range(identity.shard_count):
        record = read_record(folder, number)
        if record is None and patience.until(partial(_is_visible, folder, number)):
            record = read_record(folder, number)
        if record is None:  # another start has removed it, or this host does not see it
            raise FileSystemError(f"{CachePaths(folder).shard(number)}: missing after it was written")
        shards.append(record)
    manifest = Manifest(identity, tuple(shards))
    write_json(CachePaths(folder).manifest, manifest.as_json())
    return manifest


def _is_visible(folder: Path, shard: int) -> bool:
    with contextlib.suppress(OSError):
        os.listdir(CachePaths(folder).shards)  # NFS looks at the server again
    return read_record(folder, shard) is not None
