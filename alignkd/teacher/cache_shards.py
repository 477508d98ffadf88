"""The files of a teacher's cache: answers to consecutive samples, written whole and read by sample.

A shard is one safetensors file: the tensors of its form (:mod:`alignkd.teacher.cache_forms`), with a row
for each position, ``offsets`` int64 [samples + 1], where each sample's positions begin, and the end, and
``crc32`` int64 [samples]. The checksum of a sample is of its rows of all these tensors. It begins with the
sample's number, so it also tells a file that has another one's name.
"""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from alignkd.data.batch import Batch
from alignkd.errors import CheckpointError, raise_if_passing
from alignkd.models.building import DTYPES
from alignkd.run_folder.atomic_files import write_bytes_atomic, write_json
from alignkd.teacher.cache_forms import FORMS, Tensors
from alignkd.teacher_cache.folder import CachePaths, Identity, Shard


def write_shard(folder: Path, number: int, first: int, samples: Sequence[Tensors]) -> None:
    """Write a shard, and then its record, which makes it count. ``samples``: the tensors of each, on the
    host; ``first`` is the number of the first one. Raises OSError."""
    positions = [len(next(iter(tensors.values()))) for tensors in samples]
    places = {
        "offsets": torch.tensor(list(itertools.accumulate(positions, initial=0))),
        "crc32": torch.tensor([checksum(of.values(), sample) for sample, of in enumerate(samples, first)]),
    }
    content = save(joined(samples) | places)
    paths = CachePaths(folder)
    write_bytes_atomic(paths.shard(number), content)
    record = Shard(sum(positions), len(content), hashlib.sha256(content).hexdigest())
    write_json(paths.record(number), record.__dict__)


def joined(samples: Sequence[Tensors]) -> Tensors:
    """The rows of ``samples``, at least one, one after the other."""
    return {name: torch.cat([tensors[name] for tensors in samples]) for name in samples[0]}


def checksum(tensors: Iterable[torch.Tensor], sample: int) -> int:
    found = sample
    for tensor in tensors:
        content: Any = tensor.contiguous().view(torch.uint8).numpy()
        found = zlib.crc32(content, found)
    return found


class _OpenShard(NamedTuple):
    slices: dict[str, Any]  # of safetensors: only what is asked for is read
    offsets: list[int]
    checksums: list[int]


class CachedAnswers:
    """Reads samples from memory-mapped shards, and checks each. A process maps a shard at its first use."""

    def __init__(self, folder: Path, identity: Identity) -> None:
        self._folder, self._identity = folder, identity
        self._form, self._dtype = FORMS[identity.form], DTYPES[identity.key["precision"]]
        self._open: dict[int, _OpenShard] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __call__(self, batch: Batch, samples: Sequence[int]) -> Batch:
        """``batch``, which consists of ``samples``, with the teacher's answers to them. Raises
        CheckpointError for a damaged file, and when the samples have another number of positions."""
        stored = joined([self._empty(), *map(self._sample, samples)])
        found, positions = len(next(iter(stored.values()))), batch.counts.logits
        if found != positions:
            raise CheckpointError(
                f"{self._folder}: samples {list(samples)} have {positions} positions, in the teacher's cache "
                f"{found}; were images unusable when it was written? Write it anew"
            )
        return self._form.fill(batch, stored, self._dtype)

    def _empty(self) -> Tensors:
        return self._form.empty(self._identity.width, self._dtype)

    def _sample(self, sample: int) -> Tensors:
        number, place = divmod(sample, self._identity.shard_samples)
        path = CachePaths(self._folder).shard(number)
        try:
            if number not in self._open:
                self._open[number] = _opened(path, self._empty())
            shard = self._open[number]
            rows = slice(shard.offsets[place], shard.offsets[place + 1])
            tensors: Tensors = {name: of_shard[rows] for name, of_shard in shard.slices.items()}
            is_sound = checksum(tensors.values(), sample) == shard.checksums[place]
        except (OSError, SafetensorError, IndexError) as error:
            raise_if_passing(error, path)
            raise self._damaged(path, f"sample {sample} cannot be read ({error})") from None
        if not is_sound:
            raise self._damaged(path, f"sample {sample} is not what was written")
        return tensors

    def _damaged(self, path: Path, what: str) -> CheckpointError:
        return CheckpointError(f"{path}: {what}; remove the file, and `alignkd cache` writes it again")


def _opened(path: Path, names: Iterable[str]) -> _OpenShard:
    file: Any = safe_open(path, framework="pt")
    offsets, checksums = (file.get_tensor(name).tolist() for name in ("offsets", "crc32"))
    slices = {name: file.get_slice(name) for name in names}
    for name, of_shard in slices.items():
        if of_shard.get_shape()[0] != offsets[-1]:  # a slice that is too long would be cut without a word
            raise IndexError(f"{of_shard.get_shape()[0]} positions in {name} instead of {offsets[-1]}")
    return _OpenShard(slices, offsets, checksums)
