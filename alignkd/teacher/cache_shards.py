"""The files of a teacher's cache: hidden states of consecutive samples, written whole and read by sample.

A shard is one safetensors file: ``hidden`` [positions, D] in the teacher's dtype, ``offsets`` int64
[samples + 1], where each sample's positions begin, and the end, and ``crc32`` int64 [samples]. The checksum
of a sample begins with its number, so it also tells a file that has another one's name.
"""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from alignkd.errors import CheckpointError, raise_if_passing
from alignkd.models.building import DTYPES
from alignkd.run_folder.atomic_files import write_bytes_atomic, write_json
from alignkd.teacher_cache.folder import CachePaths, Identity, Shard


def write_shard(folder: Path, number: int, first: int, hidden: Sequence[torch.Tensor]) -> None:
    """Write a shard, and then its record, which makes it count. ``hidden``: [n, D] of each sample, on the
    host; ``first`` is the number of the first one. Raises OSError."""
    ends = itertools.accumulate((len(of_sample) for of_sample in hidden), initial=0)
    tensors = {
        "hidden": torch.cat(list(hidden)),
        "offsets": torch.tensor(list(ends)),
        "crc32": torch.tensor([checksum(of, sample) for sample, of in enumerate(hidden, first)]),
    }
    content = save(tensors)
    paths = CachePaths(folder)
    write_bytes_atomic(paths.shard(number), content)
    record = Shard(len(tensors["hidden"]), len(content), hashlib.sha256(content).hexdigest())
    write_json(paths.record(number), record.__dict__)


def checksum(hidden_ND: torch.Tensor, sample: int) -> int:
    content: Any = hidden_ND.contiguous().view(torch.uint8).numpy()
    return zlib.crc32(content, sample)


class _OpenShard(NamedTuple):
    hidden: Any  # a slice of safetensors: only what is asked for is read
    offsets: list[int]
    checksums: list[int]


class CachedHidden:
    """Reads samples from memory-mapped shards, and checks each. A process maps a shard at its first use."""

    def __init__(self, folder: Path, identity: Identity) -> None:
        self._folder, self._identity = folder, identity
        self._dtype = DTYPES[identity.key["precision"]]
        self._open: dict[int, _OpenShard] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __call__(self, samples: Sequence[int], positions: int) -> torch.Tensor:
        """[positions, D] of ``samples``, one after the other. Raises CheckpointError for a damaged file, and
        when the samples have another number of positions."""
        found = [torch.empty(0, self._identity.width, dtype=self._dtype), *map(self._sample, samples)]
        hidden_ND = torch.cat(found)
        if len(hidden_ND) != positions:
            raise CheckpointError(
                f"{self._folder}: samples {list(samples)} have {positions} positions, in the teacher's cache "
                f"{len(hidden_ND)}; were images unusable when it was written? Write it anew"
            )
        return hidden_ND

    def _sample(self, sample: int) -> torch.Tensor:
        number, place = divmod(sample, self._identity.shard_samples)
        path = CachePaths(self._folder).shard(number)
        try:
            if number not in self._open:
                self._open[number] = _opened(path)
            shard = self._open[number]
            hidden_ND: torch.Tensor = shard.hidden[shard.offsets[place] : shard.offsets[place + 1]]
            is_sound = checksum(hidden_ND, sample) == shard.checksums[place]
        except (OSError, SafetensorError, IndexError) as error:
            raise_if_passing(error, path)
            raise self._damaged(path, f"sample {sample} cannot be read ({error})") from None
        if not is_sound:
            raise self._damaged(path, f"sample {sample} is not what was written")
        return hidden_ND

    def _damaged(self, path: Path, what: str) -> CheckpointError:
        return CheckpointError(f"{path}: {what}; remove the file, and `alignkd cache` writes it again")


def _opened(path: Path) -> _OpenShard:
    file: Any = safe_open(path, framework="pt")
    offsets, checksums = (file.get_tensor(name).tolist() for name in ("offsets", "crc32"))
    hidden = file.get_slice("hidden")
    if hidden.get_shape()[0] != offsets[-1]:  # a slice that is too long would be cut without a word
        raise IndexError(f"{hidden.get_shape()[0]} positions instead of {offsets[-1]}")
    return _OpenShard(hidden, offsets, checksums)
